// The rows of a batch, each with a cache of its own.

#ifndef ROWS_CUH
#define ROWS_CUH

#include "ptx.cuh"

// Of one launch, whose parameters they are.
constexpr int MOST_ROWS = 16;

// Keys and values (positions, kv_heads, head_dim) of every row, and how many positions they hold.
struct Rows {
  bf16 *k[MOST_ROWS], *v[MOST_ROWS];
  int length[MOST_ROWS];
};

#endif
