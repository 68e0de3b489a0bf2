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

// Memory that will be read next: `lines` cache lines from `start`, `before` in earlier hints.
struct Hint {
  const char* start;
  int64_t lines, before;
};

// Lines asked for in small portions while something else computes, so that they are there in time.
struct Hints {
  const Hint* first = nullptr;
  int64_t count = 0;

  // Asks for portion `number` of `portions`.
  void ask(int64_t number, int64_t portions) const {
    if (!count) return;
    const int64_t lines = first[count - 1].before + first[count - 1].lines;
    int64_t line = lines * number / portions;
    const int64_t stop = lines * (number + 1) / portions;
    const Hint* hint = std::upper_bound(first, first + count, line,
                                        [](int64_t l, const Hint& h) { return l < h.before; }) - 1;
    for (; line < stop; line++) {
      if (line == hint->before + hint->lines) hint++;
      __builtin_prefetch(hint->start + (line - hint->before) * 64, 0, 2);
    }
  }
};

// Nothing is added to a product but its bias.
struct NoDeltas {
  void begin(int64_t, int64_t) {}
  void add(float*, int64_t, int64_t) {}
};

// What a product is made of beside x and its size. `Extra` adds to the sums of a panel before
// they are stored: it is told of a panel by `begin` (column, width), and then asked for each of
// its blocks of rows by `add` (sums [rows, kWidth], row, rows).
template <typename Weight, typename Extra>
struct Product {
  const Weight* packed;
  const float* scale;     // [n] or null
  const float* bias;      // [n] or null
  const float* residual;  // [m, n] or null
  float* y;               // [m, n]
  int64_t m, n, k;
  Extra extra;
  Hints hints;

  int64_t panels() const { return (n + kWidth - 1) / kWidth; }

  void finish(float* sums, int64_t row, int64_t rows, int64_t column, int64_t width) {
    if (scale || bias)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c++) {
          float& value = sums[r * kWidth + c];
          if (scale) value *= scale[column + c];
          if (bias) value += bias[column + c];
        }
    extra.add(sums, row, rows);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t first = (row + r) * n + column;
      for (int64_t c = 0; c < width; c++)
        y[first + c] = sums[r * kWidth + c] + (residual ? residual[first + c] : 0.0f);
    }
  }

  // Panel `number`, whose weights may have been widened to another type meanwhile.
  template <typename Wide>
  void multiply(const float* x, const Wide* panel, int64_t number) {
    const int64_t column = number * kWidth, width = std::min<int64_t>(kWidth, n - column);
    const int64_t blocks = (m + kTileRows - 1) / kTileRows;
    const char* next = reinterpret_cast<const char*>(panel + k * kWidth);
    const int64_t bytes = k * kWidth * sizeof(Wide);
    extra.begin(column, width);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t row = m * b / blocks, rows = m * (b + 1) / blocks - row;
      float sums[kTileRows * kWidth] = {};
      hints.ask(number * blocks + b, panels() * blocks);
      for (int64_t i = 0; i < k; i += kSlice) {
        const Wide* slice = panel + i * kWidth;
        const int64_t depth = std::min(kSlice, k - i);
        // Read once, a panel runs ahead of itself; else each block asks for a part of the next.
        const Ahead ahead =
            blocks == 1 ? Ahead{reinterpret_cast<const char*>(slice) + kAhead * 64,
                                static_cast<int64_t>(kWidth * sizeof(Wide))}
                        : Ahead{next + bytes * b / blocks + bytes * i / k / blocks,
                                static_cast<int64_t>(kWidth * sizeof(Wide)) / blocks + 1};
        tile_of<kTileRows>(rows, x + row * k + i, k, slice, depth, sums, kWidth, ahead);
      }
      finish(sums, row, rows, column, width);
    }
  }

  // Called by a whole team of threads, each with a Product of its own.
  void share(const float* x) {
#pragma omp for schedule(guided, 1)
    for (int64_t j = 0; j < panels(); j++) {
      const Weight* panel = packed + j * kWidth * k;
      if constexpr (std::is_same_v<Weight, int8_t>) {
        if (m > kNarrowRows) {
          multiply(x, widened(panel), j);
          continue;
        }
      }
      multiply(x, panel, j);
    }
  }

  // For several blocks of rows a panel of narrow weights is widened once.
  const float* widened(const Weight* panel) {
    static thread_local std::vector<float> wide;
    if (static_cast<int64_t>(wide.size()) < k * kWidth) wide.resize(k * kWidth);
    for (int64_t i = 0; i < k * kWidth; i += kLanes) store(wide.data() + i, widen(panel + i));
    return wide.data();
  }
};

// y [m, n] from x [m, k], plus `residual` [m, n] if that is not null; meanwhile what `hints` name
// is asked for. Called by a whole team of threads.
template <typename Extra>
void share_product(const float* x, const Projection& p, const float* residual, float* y, int64_t m,
                   const Extra& extra, const Hints& hints) {
  if (p.scale)
    Product<int8_t, Extra>{static_cast<const int8_t*>(p.packed), p.scale, p.bias, residual, y, m,
                            p.n, p.k, extra, hints}
        .share(x);
  else
    Product<float, Extra>{static_cast<const float*>(p.packed), nullptr, p.bias, residual, y, m,
                           p.n, p.k, extra, hints}
        .share(x);
}

}  // namespace dynamic_lora
