"""A small EPIC-KITCHENS-100: the official columns and traps, none of the official rows."""

from collections.abc import Callable
from pathlib import Path

from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.errors import ManifestError

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
TRAIN = (
    "P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,"
    "open door,open,1,door,2,['door'],[2]\n"
    # no narration time; three decimals; two nouns in a quoted cell
    "P01_01_10,P01,P01_01,,00:00:04.370,00:00:06.170,262,370,"
    '"put pan, lid",put,0,pan,0,"[\'pan\', \'lid\']","[0, 1]"\n'
    "P02_103_1,P02,P02_103,00:00:02.629,00:01:00.00,00:01:02.00,3000,3100,"
    "take lid,take,2,lid,1,['lid'],[1]\n"
)
VAL = (
    "P03_02_7,P03,P03_02,00:00:00.560,00:00:00.00,00:00:01.89,1,113,"
    "take pan,take,2,pan,0,['pan'],[0]\n"
    # ends 13 ms after its video
    "P03_02_8,P03,P03_02,00:00:09.000,00:00:09.00,00:00:10.02,540,601,"
    "end,take,2,lid,1,['lid'],[1]\n"
)
TEST_HEADER = ",".join(HEADER.split(",")[:8]) + "\n"
TEST = "P02_104_0,P02,P02_104,00:00:02.851,00:00:02.86,00:00:03.87,143,193\n"
VIDEOS = (
    "video_id,duration,fps,resolution\n"
    "P01_01,1652.15,59.94,1920x1080\nP02_103,80.0,50,1920x1080\nP03_02,10.007,59.94,1920x1080\n"
    "P02_104,30,50,1920x1080\n"
)


def write_annotations(folder: Path) -> Path:
    """Write all CSV files of a data set with three verbs and three nouns."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "EPIC_100_train": HEADER + TRAIN,
        "EPIC_100_validation": HEADER + VAL,
        "EPIC_100_test_timestamps": TEST_HEADER + TEST,
        "EPIC_100_video_info": VIDEOS,
        "EPIC_100_verb_classes": "id,key,instances,category\n0,put,\"['put', 'lay']\",leave\n"
        "1,open,['open'],access\n2,take,['take'],retrieve\n",
        "EPIC_100_noun_classes": "id,key,instances,category\n0,pan,['pan'],cookware\n"
        "1,lid,['lid'],cookware\n2,door,['door'],furniture\n",
        "EPIC_100_tail_verbs": "verb\n1\n\n",
        "EPIC_100_tail_nouns": "noun\n1\n2\n",
        "EPIC_100_unseen_participant_ids_validation": "participant_id\nP03\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def touch(root: Path, *names: str) -> None:
    """Make empty files or, for names with a closing slash, folders."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()


def complaint(read: Callable[[], Manifest]) -> str:
    """What is said of a data set's faults: those that stop it, or those it goes on without."""
    try:
        return "; ".join(read().left_out)
    except ManifestError as error:
        return str(error)
