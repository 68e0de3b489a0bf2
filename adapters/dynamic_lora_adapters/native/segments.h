// Low-rank deltas of rows sorted by adapter, in float32: out += (x A^T) B, segment by segment.
//
// Each table is read once, whatever the number of rows that share it, and in
// order; nothing is padded and nothing is gathered. Blocks of B that are zero,
// because a projection's outputs do not read another projection's ranks, are
// not read at all.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace dynamic_lora {

constexpr int kRows = 6;        // rows summed in registers at a time
constexpr int kRanks = 2;       // by this many ranks when shrinking,
constexpr int kVecs = 2;        // by this many vectors of outputs when expanding
constexpr int64_t kStrip = 64;  // outputs that one thread expands to at a time

// Neighbouring rows of one adapter.
struct Segment {
  const float* a;          // [rank, in]
  const float* b;          // [rank, out]
  const int64_t* columns;  // [rank, 2]: where a row of b is not zero; null: anywhere
  float* shrunk;           // [rows, rank]: what is kept between the two products
  int64_t rank, row, rows;
  float sign;
};

// The input and the output that the segments are rows of.
struct Deltas {
  const float* x;
  float* out;
  int64_t ldx, ldo, in, outs;
};

template <int Rows, int Ranks>
void shrink_tile(const Deltas& d, const Segment& s, const float* x, const float* a, float* shrunk) {
  Vec sums[Rows][Ranks];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int q = 0; q < Ranks; q++) sums[r][q] = Vec{};
  }
  int64_t i = 0;
  for (; i + kLanes <= d.in; i += kLanes) {
    Vec factors[Ranks];
    UNROLL
    for (int q = 0; q < Ranks; q++) factors[q] = load(a + q * d.in + i);
    __builtin_prefetch(a + Ranks * d.in + i);
    __builtin_prefetch(a + (Ranks + 1) * d.in + i);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const Vec input = load(x + r * d.ldx + i);
      UNROLL
      for (int q = 0; q < Ranks; q++) sums[r][q] += input * factors[q];
    }
  }
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int q = 0; q < Ranks; q++) {
      float total = sum(sums[r][q]);
      for (int64_t rest = i; rest < d.in; rest++)
        total += x[r * d.ldx + rest] * a[q * d.in + rest];
      shrunk[r * s.rank + q] = s.sign * total;
    }
  }
}

template <int Rows, int Ranks>
void shrink_rows(int64_t rows, const Deltas& d, const Segment& s, const float* x, const float* a, float* shrunk) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      shrink_tile<Rows, Ranks>(d, s, x, a, shrunk);
    else
      shrink_rows<Rows - 1, Ranks>(rows, d, s, x, a, shrunk);
  }
}

// Rows are cut into blocks of nearly equal size: a remainder of one row would cost as much as four.
template <int Ranks>
void shrink(const Deltas& d, const Segment& s, const float* a, float* shrunk) {
  const float* x = d.x + s.row * d.ldx;
  const int64_t rows = s.rows, blocks = (rows + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t r = rows * block / blocks, count = rows * (block + 1) / blocks - r;
    shrink_rows<kRows, Ranks>(count, d, s, x + r * d.ldx, a, shrunk + r * s.rank);
  }
}

template <int Rows, int Vecs>
void expand_tile(const Deltas& d, const Segment& s, const float* shrunk, const float* b, int64_t ranks,
                 float* out) {
  Vec sums[Rows][Vecs];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) sums[r][v] = load(out + r * d.ldo + v * kLanes);
  }
  for (int64_t q = 0; q < ranks; q++) {
    Vec factors[Vecs];
    UNROLL
    for (int v = 0; v < Vecs; v++) factors[v] = load(b + q * d.outs + v * kLanes);
    __builtin_prefetch(b + q * d.outs + kStrip);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const float weight = shrunk[r * s.rank + q];
      UNROLL
      for (int v = 0; v < Vecs; v++) sums[r][v] += weight * factors[v];
    }
  }
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) store(out + r * d.ldo + v * kLanes, sums[r][v]);
  }
}

template <int Rows>
void expand_rows(int64_t rows, const Deltas& d, const Segment& s, const float* shrunk, const float* b,
                 int64_t ranks, float* out) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      expand_tile<Rows, kVecs>(d, s, shrunk, b, ranks, out);
    else
      expand_rows<Rows - 1>(rows, d, s, shrunk, b, ranks, out);
  }
}

inline void expand(const Deltas& d, const Segment& s, int64_t rows, const float* shrunk, const float* b, int64_t ranks,
            float* out) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t r = rows * block / blocks, count = rows * (block + 1) / blocks - r;
    expand_rows<kRows>(count, d, s, shrunk + r * s.rank, b, ranks, out + r * d.ldo);
  }
}

// Adds ranks [first, last) of a segment to outputs [column, stop).
inline void expand_strip(const Deltas& d, const Segment& s, int64_t first, int64_t last,
                         int64_t column, int64_t stop) {
  const float* b = s.b + first * d.outs;
  const float* weights = s.shrunk + first;
  const int64_t ranks = last - first;
  float* out = d.out + s.row * d.ldo;
  for (; column + kVecs * kLanes <= stop; column += kVecs * kLanes)
    expand(d, s, s.rows, weights, b + column, ranks, out + column);
  for (; column < stop; column++)
    for (int64_t r = 0; r < s.rows; r++)
      for (int64_t q = 0; q < ranks; q++)
        out[r * d.ldo + column] += weights[r * s.rank + q] * b[q * d.outs + column];
}

// Neighbouring ranks that reach the same outputs are added together.
inline void expand_segment(const Deltas& d, const Segment& s, int64_t column, int64_t stop) {
  if (!s.columns) return expand_strip(d, s, 0, s.rank, column, stop);
  for (int64_t first = 0, last; first < s.rank; first = last) {
    const int64_t from = s.columns[first * 2], to = s.columns[first * 2 + 1];
    for (last = first + 1; last < s.rank; last++)
      if (s.columns[last * 2] != from || s.columns[last * 2 + 1] != to) break;
    if (std::max(column, from) < std::min(stop, to))
      expand_strip(d, s, first, last, std::max(column, from), std::min(stop, to));
  }
}

// Adds the deltas of all segments. Called by a whole team of threads.
inline void share_deltas(const Deltas& d, const Segment* segments, int64_t count) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < count; i++) pairs += (segments[i].rank + kRanks - 1) / kRanks;
  const Segment* s = segments;
  int64_t start = 0;  // the first of this segment's pairs
#pragma omp for schedule(guided, 1)
  for (int64_t pair = 0; pair < pairs; pair++) {
    if (pair < start) s = segments, start = 0;
    for (int64_t own; pair - start >= (own = (s->rank + kRanks - 1) / kRanks); s++) start += own;
    const int64_t rank = (pair - start) * kRanks;
    if (rank + kRanks <= s->rank)
      shrink<kRanks>(d, *s, s->a + rank * d.in, s->shrunk + rank);
    else
      shrink<1>(d, *s, s->a + rank * d.in, s->shrunk + rank);
  }
  const int64_t strips = (d.outs + kStrip - 1) / kStrip;
#pragma omp for schedule(guided, 1)
  for (int64_t strip = 0; strip < strips; strip++)
    for (int64_t i = 0; i < count; i++)
      expand_segment(d, segments[i], strip * kStrip, std::min(strip * kStrip + kStrip, d.outs));
}

}  // namespace dynamic_lora
