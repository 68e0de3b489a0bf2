// Low-rank deltas of rows sorted by adapter, in float32: out += (x A^T) B, segment by segment.
//
// Each table is read once, whatever the number of rows that share it, and in
// order; nothing is padded and nothing is gathered. Blocks of B that are zero,
// because a projection's outputs do not read another projection's ranks, are
// not read at all.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

using namespace dynamic_lora;

namespace {

constexpr int kRows = 6;      // rows summed in registers at a time
constexpr int kRanks = 2;     // by this many ranks when shrinking,
constexpr int kVecs = 2;      // by this many vectors of outputs when expanding
constexpr int64_t kStrip = 64;  // outputs that one thread expands to at a time

struct Segments {
  const float* x;
  float* out;
  const float* a;           // [slots, rank, in]
  const float* b;           // [slots, rank, out]
  const int64_t* lengths;   // [slots]
  const int64_t* columns;   // [slots, rank, 2]: where a row of b is not zero; null: anywhere
  int64_t ldx, ldo, slots, rank, in, outs;
  float sign;
};

template <int Rows, int Ranks>
void shrink_tile(const Segments& s, const float* x, const float* a, float* shrunk) {
  Vec sums[Rows][Ranks];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int q = 0; q < Ranks; q++) sums[r][q] = Vec{};
  }
  int64_t i = 0;
  for (; i + kLanes <= s.in; i += kLanes) {
    Vec factors[Ranks];
    UNROLL
    for (int q = 0; q < Ranks; q++) factors[q] = load(a + q * s.in + i);
    __builtin_prefetch(a + Ranks * s.in + i);
    __builtin_prefetch(a + (Ranks + 1) * s.in + i);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const Vec input = load(x + r * s.ldx + i);
      UNROLL
      for (int q = 0; q < Ranks; q++) sums[r][q] += input * factors[q];
    }
  }
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int q = 0; q < Ranks; q++) {
      float total = sum(sums[r][q]);
      for (int64_t rest = i; rest < s.in; rest++)
        total += x[r * s.ldx + rest] * a[q * s.in + rest];
      shrunk[r * s.rank + q] = s.sign * total;
    }
  }
}

template <int Rows, int Ranks>
void shrink_rows(int64_t rows, const Segments& s, const float* x, const float* a, float* shrunk) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      shrink_tile<Rows, Ranks>(s, x, a, shrunk);
    else
      shrink_rows<Rows - 1, Ranks>(rows, s, x, a, shrunk);
  }
}

// Rows are cut into blocks of nearly equal size: a remainder of one row would cost as much as four.
template <int Ranks>
void shrink(const Segments& s, int64_t rows, const float* x, const float* a, float* shrunk) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t r = rows * block / blocks, count = rows * (block + 1) / blocks - r;
    shrink_rows<kRows, Ranks>(count, s, x + r * s.ldx, a, shrunk + r * s.rank);
  }
}

template <int Rows, int Vecs>
void expand_tile(const Segments& s, const float* shrunk, const float* b, int64_t ranks,
                 float* out) {
  Vec sums[Rows][Vecs];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) sums[r][v] = load(out + r * s.ldo + v * kLanes);
  }
  for (int64_t q = 0; q < ranks; q++) {
    Vec factors[Vecs];
    UNROLL
    for (int v = 0; v < Vecs; v++) factors[v] = load(b + q * s.outs + v * kLanes);
    __builtin_prefetch(b + q * s.outs + kStrip);
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
    for (int v = 0; v < Vecs; v++) store(out + r * s.ldo + v * kLanes, sums[r][v]);
  }
}

template <int Rows>
void expand_rows(int64_t rows, const Segments& s, const float* shrunk, const float* b,
                 int64_t ranks, float* out) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      expand_tile<Rows, kVecs>(s, shrunk, b, ranks, out);
    else
      expand_rows<Rows - 1>(rows, s, shrunk, b, ranks, out);
  }
}

void expand(const Segments& s, int64_t rows, const float* shrunk, const float* b, int64_t ranks,
            float* out) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t r = rows * block / blocks, count = rows * (block + 1) / blocks - r;
    expand_rows<kRows>(count, s, shrunk + r * s.rank, b, ranks, out + r * s.ldo);
  }
}

// Adds ranks [first, last) of a slot to outputs [column, stop).
void expand_strip(const Segments& s, int64_t slot, int64_t row, const float* shrunk, int64_t first,
                  int64_t last, int64_t column, int64_t stop) {
  const float* b = s.b + (slot * s.rank + first) * s.outs;
  const float* weights = shrunk + row * s.rank + first;
  const int64_t rows = s.lengths[slot], ranks = last - first;
  float* out = s.out + row * s.ldo;
  for (; column + kVecs * kLanes <= stop; column += kVecs * kLanes)
    expand(s, rows, weights, b + column, ranks, out + column);
  for (; column < stop; column++)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t q = 0; q < ranks; q++)
        out[r * s.ldo + column] += weights[r * s.rank + q] * b[q * s.outs + column];
}

// Neighbouring ranks that reach the same outputs are added together.
void expand_slot(const Segments& s, int64_t slot, int64_t row, const float* shrunk, int64_t column,
                 int64_t stop) {
  if (!s.columns) return expand_strip(s, slot, row, shrunk, 0, s.rank, column, stop);
  const int64_t* columns = s.columns + slot * s.rank * 2;
  for (int64_t first = 0, last; first < s.rank; first = last) {
    const int64_t from = columns[first * 2], to = columns[first * 2 + 1];
    for (last = first + 1; last < s.rank; last++)
      if (columns[last * 2] != from || columns[last * 2 + 1] != to) break;
    if (std::max(column, from) < std::min(stop, to))
      expand_strip(s, slot, row, shrunk, first, last, std::max(column, from), std::min(stop, to));
  }
}

}  // namespace

// sizes: row stride of x, row stride of out, slots, rank, inputs, outputs.
extern "C" void dynamic_lora_segments(const float* x, float* out, const float* a, const float* b,
                                      const int64_t* lengths, const int64_t* columns,
                                      const int64_t* sizes, float sign) {
  static thread_local std::vector<float> kept;
  const Segments s{x,        out,      a,        b,        lengths,  columns, sizes[0],
                   sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sign};
  int64_t rows = 0;
  for (int64_t i = 0; i < s.slots; i++) rows += lengths[i];
  if (static_cast<int64_t>(kept.size()) < rows * s.rank) kept.resize(rows * s.rank);
  float* scratch = kept.data();  // of the calling thread, shared by its team
  const int64_t pairs = (s.rank + kRanks - 1) / kRanks;
  const int64_t strips = (s.outs + kStrip - 1) / kStrip;
#pragma omp parallel
  {
#pragma omp for schedule(guided, 1)
    for (int64_t item = 0; item < s.slots * pairs; item++) {
      const int64_t slot = item / pairs, rank = item % pairs * kRanks;
      int64_t row = 0;
      for (int64_t i = 0; i < slot; i++) row += s.lengths[i];
      const float* factors = s.a + (slot * s.rank + rank) * s.in;
      float* shrunk = scratch + row * s.rank + rank;
      if (rank + kRanks <= s.rank)
        shrink<kRanks>(s, s.lengths[slot], s.x + row * s.ldx, factors, shrunk);
      else
        shrink<1>(s, s.lengths[slot], s.x + row * s.ldx, factors, shrunk);
    }
#pragma omp for schedule(guided, 1)
    for (int64_t strip = 0; strip < strips; strip++) {
      int64_t row = 0;
      for (int64_t slot = 0; slot < s.slots; slot++) {
        expand_slot(s, slot, row, scratch, strip * kStrip, std::min(strip * kStrip + kStrip, s.outs));
        row += s.lengths[slot];
      }
    }
  }
}
