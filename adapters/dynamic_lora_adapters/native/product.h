// y = x W^T + bias for a few to a few hundred rows of x, in float32, from a packed W.
//
// W [n, k] is packed in panels of kWidth outputs, [k][kWidth] each, so that a
// panel is read once, in order, for all rows. Up to kRows rows are summed in
// registers at a time (the register tiling of Goto & van de Geijn 2008); while
// they are, the next panel is asked for, so that waiting for memory and
// computing overlap. Threads take panels as they finish: a core that something
// else disturbs does not hold the other up.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace dynamic_lora {

constexpr int kPanelVecs = 2;
constexpr int kWidth = kPanelVecs * kLanes;
// Sums, two weights and one input fit into 16 (AVX2) or 32 (AVX-512) registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
constexpr int64_t kSlice = 2048;  // inputs summed per pass: a slice of a panel stays in L2
constexpr int64_t kAhead = 32;    // lines asked for in advance when a panel is read only once
// Beyond so many rows a panel in eight bits is widened once for all of them (measured on AVX2).
constexpr int64_t kNarrowRows = 6 * kTileRows;

// The weight of a linear layer, in panels: float32, or eight bits with a scale for each output.
struct Projection {
  const void* packed;
  const float* scale;  // [n]; null says that the panels are float32
  const float* bias;   // [n] or null
  int64_t n, k;
};

inline Vec widen(const float* p) { return load(p); }

// Spelt out for x86, where GCC converts the lanes one by one.
inline Vec widen(const int8_t* p) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vec wide;
  UNROLL
  for (int i = 0; i < kLanes; i++) wide[i] = p[i];
  return wide;
#endif
}

struct Ahead {
  const char* line;
  int64_t step;  // bytes per input
};

// Adds x [Rows, depth] times a panel slice [depth, kWidth] to y.
template <int Rows, typename Weight>
__attribute__((noinline)) void tile(const float* x, int64_t ldx, const Weight* panel, int64_t depth,
                                    float* y, int64_t ldy, Ahead ahead) {
  Vec sums[Rows][kPanelVecs];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) sums[r][v] = load(y + r * ldy + v * kLanes);
  }
  for (int64_t i = 0; i < depth; i++) {
    Vec weights[kPanelVecs];
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) weights[v] = widen(panel + i * kWidth + v * kLanes);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const float input = x[r * ldx + i];
      UNROLL
      for (int v = 0; v < kPanelVecs; v++) sums[r][v] += input * weights[v];
    }
    __builtin_prefetch(ahead.line);
    ahead.line += ahead.step;
  }
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) store(y + r * ldy + v * kLanes, sums[r][v]);
  }
}

template <int Rows, typename Weight>
void tile_of(int64_t rows, const float* x, int64_t ldx, const Weight* panel, int64_t depth,
             float* y, int64_t ldy, Ahead ahead) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      tile<Rows>(x, ldx, panel, depth, y, ldy, ahead);
    else
      tile_of<Rows - 1>(rows, x, ldx, panel, depth, y, ldy, ahead);
  }
}

// What is done with the sums of one panel before they are stored; each may be null.
struct Ending {
  const float* scale;  // [width]
  const float* bias;   // [width]
  const float* add;    // [m, n], as y: added last

  Ending at(int64_t column) const {
    return {scale ? scale + column : nullptr, bias ? bias + column : nullptr,
            add ? add + column : nullptr};
  }
};

inline void finish_panel(const float* sums, const Ending& end, float* y, int64_t row, int64_t rows,
                         int64_t n, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    const float* from = sums + r * kWidth;
    float* to = y + (row + r) * n;
    const float* add = end.add ? end.add + (row + r) * n : nullptr;
    for (int64_t c = 0; c < width; c++) {
      float value = from[c];
      if (end.scale) value *= end.scale[c];
      if (end.bias) value += end.bias[c];
      to[c] = add ? value + add[c] : value;
    }
  }
}

template <typename Weight>
void panel_product(const float* x, const Weight* panel, const Ending& end, float* y, int64_t m,
                   int64_t n, int64_t k, int64_t width) {
  const int64_t blocks = (m + kTileRows - 1) / kTileRows;
  const char* next = reinterpret_cast<const char*>(panel + k * kWidth);
  const int64_t bytes = k * kWidth * sizeof(Weight);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t row = m * b / blocks, rows = m * (b + 1) / blocks - row;
    float sums[kTileRows * kWidth] = {};
    for (int64_t i = 0; i < k; i += kSlice) {
      const Weight* slice = panel + i * kWidth;
      const int64_t depth = std::min(kSlice, k - i);
      // Read once, a panel runs ahead of itself; else each block asks for a part of the next.
      const Ahead ahead =
          blocks == 1 ? Ahead{reinterpret_cast<const char*>(slice) + kAhead * 64,
                              static_cast<int64_t>(kWidth * sizeof(Weight))}
                      : Ahead{next + bytes * b / blocks + bytes * i / k / blocks,
                              static_cast<int64_t>(kWidth * sizeof(Weight)) / blocks + 1};
      tile_of<kTileRows>(rows, x + row * k + i, k, slice, depth, sums, kWidth, ahead);
    }
    finish_panel(sums, end, y, row, rows, n, width);
  }
}

// For several blocks of rows a panel of narrow weights is widened once.
inline void panel_product_widened(const float* x, const int8_t* panel, const Ending& end, float* y,
                                  int64_t m, int64_t n, int64_t k, int64_t width) {
  static thread_local std::vector<float> wide;
  if (static_cast<int64_t>(wide.size()) < k * kWidth) wide.resize(k * kWidth);
  for (int64_t i = 0; i < k * kWidth; i += kLanes) store(wide.data() + i, widen(panel + i));
  panel_product(x, wide.data(), end, y, m, n, k, width);
}

// y [m, n] from x [m, k]; `add` [m, n] or null. Called by a whole team of threads.
template <typename Weight>
void share_product(const float* x, const Weight* packed, const Ending& end, float* y, int64_t m,
                   int64_t n, int64_t k) {
  const int64_t panels = (n + kWidth - 1) / kWidth;
#pragma omp for schedule(guided, 1)
  for (int64_t j = 0; j < panels; j++) {
    const int64_t column = j * kWidth;
    const int64_t width = std::min<int64_t>(kWidth, n - column);
    if constexpr (std::is_same_v<Weight, int8_t>) {
      if (m > kNarrowRows) {
        panel_product_widened(x, packed + column * k, end.at(column), y + column, m, n, k, width);
        continue;
      }
    }
    panel_product(x, packed + column * k, end.at(column), y + column, m, n, k, width);
  }
}

inline void share_product(const float* x, const Projection& p, const float* add, float* y,
                          int64_t m) {
  const Ending end{p.scale, p.bias, add};
  if (p.scale)
    share_product(x, static_cast<const int8_t*>(p.packed), end, y, m, p.n, p.k);
  else
    share_product(x, static_cast<const float*>(p.packed), end, y, m, p.n, p.k);
}

}  // namespace dynamic_lora
