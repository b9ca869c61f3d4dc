/* Counts the calls that change files under one folder, and lets one of them fail or kill.
 *
 * Preloaded into every process of a run (LD_PRELOAD), so that libraries' calls count as well as
 * Python's. What to do stands in a file of shared memory that calls.py writes; the count is
 * shared by all processes of the run.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum stays { ONCE, FULL, ALL }; /* until when an error lasts: one call, a full disk, any change */

struct plan {
    uint64_t count;  /* calls until now */
    uint64_t at;     /* the call that is hit, from 1; 0: none */
    int32_t error;   /* its errno; 0: SIGKILL for the whole process group, in mid-write;
                        below 0: another signal, for this process alone, and the call goes on */
    int32_t stays;
    char root[PATH_MAX];
};

static struct plan *plan;
static int list = -1; /* one line for each call */

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("KARMMA_FAULTS");
    if (path == NULL) return;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) return;
    void *shared = mmap(NULL, sizeof(struct plan), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s.list", path);
    list = open(name, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (shared != MAP_FAILED) plan = shared;
}

#define REAL(name, ...) ((__typeof__(&name))real(#name))(__VA_ARGS__)

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

/* Return the error that a call is to end with, 0 to let it pass, -1 to kill. */
static int fate(const char *call, const char *path) {
    if (plan == NULL || plan->root[0] == 0) return 0;
    size_t length = strlen(plan->root);
    if (strncmp(path, plan->root, length) != 0 || (path[length] != '/' && path[length] != 0)) return 0;
    uint64_t number = __atomic_add_fetch(&plan->count, 1, __ATOMIC_SEQ_CST);
    char line[2 * PATH_MAX];
    int size = snprintf(line, sizeof line, "%s %s\n", call, path + length);
    if (list >= 0 && REAL(write, list, line, (size_t)size) < 0) list = -1;
    if (plan->at == 0 || number < plan->at) return 0;
    if (plan->error < 0) {
        if (number == plan->at) kill(getpid(), -plan->error);
        return 0;
    }
    if (number == plan->at) return plan->error ? plan->error : -1;
    int grows = strstr("create write mkdir link truncate", call) != NULL;
    int later = plan->stays == ALL || (plan->stays == FULL && grows);
    return later && plan->error ? plan->error : 0;
}

static void die(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

static int hit(const char *call, const char *path) {
    int error = fate(call, path);
    if (error < 0) die();
    if (error > 0) errno = error;
    return error;
}

static const char *inside(int folder, const char *path, char *buffer) {
    if (path[0] == '/') return path;
    char where[PATH_MAX] = "";
    if (folder == AT_FDCWD) {
        if (getcwd(where, sizeof where) == NULL) return path;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, where, sizeof where - 1);
        where[size > 0 ? size : 0] = 0;
    }
    snprintf(buffer, PATH_MAX, "%.2000s/%.2000s", where, path);
    return buffer;
}

static int hit_at(const char *call, int folder, const char *path) {
    char buffer[PATH_MAX];
    return hit(call, inside(folder, path, buffer));
}

static const char *path_of(int file, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, buffer, PATH_MAX - 1);
    buffer[size > 0 ? size : 0] = 0;
    return buffer;
}

static int hit_file(const char *call, int file) {
    char buffer[PATH_MAX];
    return hit(call, path_of(file, buffer));
}

/* A disk that fills up, or a kill, leaves half of what was to be written. */
typedef ssize_t writer(int file, const void *data, size_t size, off_t at);

static ssize_t torn(writer *rest, int file, const void *data, size_t size, off_t at) {
    char buffer[PATH_MAX];
    int error = fate("write", path_of(file, buffer));
    if (error == 0) return rest(file, data, size, at);
    int halves = error < 0 || error == ENOSPC || error == EDQUOT;
    ssize_t done = halves && size > 1 ? rest(file, data, size / 2, at) : 0;
    if (error < 0) die();
    if (done > 0) return done;
    errno = error;
    return -1;
}

static ssize_t plain(int file, const void *data, size_t size, off_t at) {
    (void)at;
    return REAL(write, file, data, size);
}
static ssize_t placed(int file, const void *data, size_t size, off_t at) {
    return REAL(pwrite, file, data, size, at);
}

ssize_t write(int file, const void *data, size_t size) { return torn(plain, file, data, size, 0); }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return torn(placed, file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return pwrite(file, data, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return hit_file("write", file) ? -1 : REAL(writev, file, parts, count);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    return hit_file("write", out) ? -1 : REAL(sendfile, out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    return hit_file("write", out) ? -1 : REAL(sendfile64, out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    return hit_file("write", out) ? -1 : REAL(copy_file_range, in, from, out, to, size, flags);
}

int fsync(int file) { return hit_file("fsync", file) ? -1 : REAL(fsync, file); }
int fdatasync(int file) { return hit_file("fsync", file) ? -1 : REAL(fdatasync, file); }
int ftruncate(int file, off_t size) {
    return hit_file("truncate", file) ? -1 : REAL(ftruncate, file, size);
}
int ftruncate64(int file, off64_t size) {
    return hit_file("truncate", file) ? -1 : REAL(ftruncate64, file, size);
}
int truncate(const char *path, off_t size) {
    return hit_at("truncate", AT_FDCWD, path) ? -1 : REAL(truncate, path, size);
}
int posix_fallocate(int file, off_t at, off_t size) {
    int error = hit_file("truncate", file);
    return error ? error : REAL(posix_fallocate, file, at, size);
}

int rename(const char *from, const char *to) {
    return hit_at("rename", AT_FDCWD, to) ? -1 : REAL(rename, from, to);
}
int renameat(int from_folder, const char *from, int folder, const char *to) {
    return hit_at("rename", folder, to) ? -1 : REAL(renameat, from_folder, from, folder, to);
}
int renameat2(int from_folder, const char *from, int folder, const char *to, unsigned flags) {
    if (hit_at("rename", folder, to)) return -1;
    return REAL(renameat2, from_folder, from, folder, to, flags);
}
int link(const char *from, const char *to) {
    return hit_at("link", AT_FDCWD, to) ? -1 : REAL(link, from, to);
}
int linkat(int from_folder, const char *from, int folder, const char *to, int flags) {
    return hit_at("link", folder, to) ? -1 : REAL(linkat, from_folder, from, folder, to, flags);
}
int symlink(const char *text, const char *path) {
    return hit_at("link", AT_FDCWD, path) ? -1 : REAL(symlink, text, path);
}
int unlink(const char *path) {
    return hit_at("unlink", AT_FDCWD, path) ? -1 : REAL(unlink, path);
}
int unlinkat(int folder, const char *path, int flags) {
    return hit_at("unlink", folder, path) ? -1 : REAL(unlinkat, folder, path, flags);
}
int rmdir(const char *path) { return hit_at("unlink", AT_FDCWD, path) ? -1 : REAL(rmdir, path); }

/* What is there already cannot fail to be made. */
static int hit_new(const char *call, int folder, const char *path) {
    int before = errno;
    if (faccessat(folder, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0) return 0;
    errno = before;
    return hit_at(call, folder, path);
}

int mkdir(const char *path, mode_t mode) {
    return hit_new("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir, path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    return hit_new("mkdir", folder, path) ? -1 : REAL(mkdirat, folder, path, mode);
}

/* Opening counts where it makes a file. */
#define OPENER(name, folder, path, ...)                                    \
    mode_t mode = 0;                                                       \
    if (flags & (O_CREAT | O_TMPFILE)) {                                   \
        va_list more;                                                      \
        va_start(more, flags);                                             \
        mode = va_arg(more, mode_t);                                       \
        va_end(more);                                                      \
    }                                                                      \
    if ((flags & O_CREAT) && hit_new("create", folder, path)) return -1;   \
    return REAL(name, __VA_ARGS__, flags, mode)

int open(const char *path, int flags, ...) { OPENER(open, AT_FDCWD, path, path); }
int open64(const char *path, int flags, ...) { OPENER(open64, AT_FDCWD, path, path); }
int openat(int folder, const char *path, int flags, ...) {
    OPENER(openat, folder, path, folder, path);
}
int openat64(int folder, const char *path, int flags, ...) {
    OPENER(openat64, folder, path, folder, path);
}
FILE *fopen(const char *path, const char *mode) {
    return mode[0] != 'r' && hit_new("create", AT_FDCWD, path) ? NULL : REAL(fopen, path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return mode[0] != 'r' && hit_new("create", AT_FDCWD, path) ? NULL : REAL(fopen64, path, mode);
}
