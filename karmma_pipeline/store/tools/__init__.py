"""What is made from finished stores: copies, subsets, exports, comparisons."""
