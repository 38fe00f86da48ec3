// The rows of a batch, each with its own cache.

#ifndef ROWS_CUH
#define ROWS_CUH

#include "../ptx.cuh"

// Per launch: they are parameters of it.
constexpr int MAX_ROWS = 16;

// Keys and values (positions, kv_heads, head_dim) of every row, and how many positions are in use.
struct Rows {
  bf16 *k[MAX_ROWS], *v[MAX_ROWS];
  int length[MAX_ROWS];
};

#endif
