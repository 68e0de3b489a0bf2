// y = x W^T + bias for a few to a few hundred rows of x, in float32, from a packed W.
//
// W [n, k] is packed in panels of kWidth outputs, [k][kWidth] each, so that a
// panel is read once, in order, for all rows. Up to kRows rows are summed in
// registers at a time (the register tiling of Goto & van de Geijn 2008); while
// they are, the next panel is asked for, so that waiting for memory and
// computing overlap. Threads take panels as they finish: a core that something
// else disturbs does not hold the other up.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

using namespace dynamic_lora;

namespace {

constexpr int kVecs = 2;
constexpr int kWidth = kVecs * kLanes;
// Sums, two weights and one input fit into 16 (AVX2) or 32 (AVX-512) registers.
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int64_t kSlice = 2048;    // inputs summed per pass: a slice of a panel stays in L2
constexpr int64_t kAhead = 32;      // lines asked for in advance when a panel is read only once
// Beyond so many rows a panel in eight bits is widened once for all of them (measured on AVX2).
constexpr int64_t kNarrowRows = 6 * kRows;

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
  Vec sums[Rows][kVecs];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < kVecs; v++) sums[r][v] = load(y + r * ldy + v * kLanes);
  }
  for (int64_t i = 0; i < depth; i++) {
    Vec weights[kVecs];
    UNROLL
    for (int v = 0; v < kVecs; v++) weights[v] = widen(panel + i * kWidth + v * kLanes);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const float input = x[r * ldx + i];
      UNROLL
      for (int v = 0; v < kVecs; v++) sums[r][v] += input * weights[v];
    }
    __builtin_prefetch(ahead.line);
    ahead.line += ahead.step;
  }
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < kVecs; v++) store(y + r * ldy + v * kLanes, sums[r][v]);
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

template <typename Weight>
void panel_product(const float* x, const Weight* panel, const float* scale, const float* bias,
                   float* y, int64_t m, int64_t n, int64_t k, int64_t width) {
  const int64_t blocks = (m + kRows - 1) / kRows;
  const char* next = reinterpret_cast<const char*>(panel + k * kWidth);
  const int64_t bytes = k * kWidth * sizeof(Weight);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t row = m * b / blocks, rows = m * (b + 1) / blocks - row;
    float sums[kRows * kWidth] = {};
    for (int64_t i = 0; i < k; i += kSlice) {
      const Weight* slice = panel + i * kWidth;
      const int64_t depth = std::min(kSlice, k - i);
      // Read once, a panel runs ahead of itself; else each block asks for a part of the next.
      const Ahead ahead =
          blocks == 1 ? Ahead{reinterpret_cast<const char*>(slice) + kAhead * 64,
                              static_cast<int64_t>(kWidth * sizeof(Weight))}
                      : Ahead{next + bytes * b / blocks + bytes * i / k / blocks,
                              static_cast<int64_t>(kWidth * sizeof(Weight)) / blocks + 1};
      tile_of<kRows>(rows, x + row * k + i, k, slice, depth, sums, kWidth, ahead);
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        float value = sums[r * kWidth + c];
        if (scale) value *= scale[c];
        y[(row + r) * n + c] = bias ? value + bias[c] : value;
      }
  }
}

// For several blocks of rows a panel of narrow weights is widened once.
void panel_product_widened(const float* x, const int8_t* panel, const float* scale,
                           const float* bias, float* y, int64_t m, int64_t n, int64_t k,
                           int64_t width) {
  static thread_local std::vector<float> wide;
  if (static_cast<int64_t>(wide.size()) < k * kWidth) wide.resize(k * kWidth);
  for (int64_t i = 0; i < k * kWidth; i += kLanes) store(wide.data() + i, widen(panel + i));
  panel_product(x, wide.data(), scale, bias, y, m, n, k, width);
}

template <typename Weight>
void product(const float* x, const Weight* packed, const float* scale, const float* bias, float* y,
             int64_t m, int64_t n, int64_t k) {
  const int64_t panels = (n + kWidth - 1) / kWidth;
#pragma omp parallel for schedule(guided, 1)
  for (int64_t j = 0; j < panels; j++) {
    const int64_t column = j * kWidth;
    const float* scales = scale ? scale + column : nullptr;
    const float* biases = bias ? bias + column : nullptr;
    const int64_t width = std::min<int64_t>(kWidth, n - column);
    if constexpr (std::is_same_v<Weight, int8_t>) {
      if (m > kNarrowRows) {
        panel_product_widened(x, packed + column * k, scales, biases, y + column, m, n, k, width);
        continue;
      }
    }
    panel_product(x, packed + column * k, scales, biases, y + column, m, n, k, width);
  }
}

template <typename Weight>
void pack(const Weight* weight, int64_t ldw, Weight* packed, int64_t n, int64_t k) {
  const int64_t panels = (n + kWidth - 1) / kWidth;
#pragma omp parallel for schedule(guided, 1)
  for (int64_t j = 0; j < panels; j++)
    for (int64_t i = 0; i < k; i++)
      for (int64_t c = 0; c < kWidth; c++) {
        const int64_t column = j * kWidth + c;
        packed[(j * k + i) * kWidth + c] = column < n ? weight[column * ldw + i] : Weight(0);
      }
}

}  // namespace

extern "C" {

int64_t dynamic_lora_panel_width() { return kWidth; }

// weight [n, k] with rows ldw apart; packed has room for n rounded up to whole panels.
void dynamic_lora_pack(const float* weight, int64_t ldw, float* packed, int64_t n, int64_t k) {
  pack(weight, ldw, packed, n, k);
}

void dynamic_lora_pack_int8(const int8_t* weight, int64_t ldw, int8_t* packed, int64_t n,
                            int64_t k) {
  pack(weight, ldw, packed, n, k);
}

// x [m, k], y [m, n], both dense; bias [n] or null.
void dynamic_lora_product(const float* x, const float* packed, const float* bias, float* y,
                          int64_t m, int64_t n, int64_t k) {
  product(x, packed, nullptr, bias, y, m, n, k);
}

// As above; output j is multiplied by scale[j] before the bias is added.
void dynamic_lora_product_int8(const float* x, const int8_t* packed, const float* scale,
                               const float* bias, float* y, int64_t m, int64_t n, int64_t k) {
  product(x, packed, scale, bias, y, m, n, k);
}

}  // extern "C"
