// Products on a processor's matrix unit (Intel AMX): 16 rows of inputs times 16 outputs of a
// panel, 32 inputs deep, in one instruction.
//
// A unit's tile of weights is 16 rows of pairs of inputs, which is how a panel in bfloat16 lies
// already. Up to 32 rows of x are multiplied by a panel's 32 outputs at a time, so that each tile
// that is read is used twice.
//
// For weights in eight bits, inputs in sixteen are split into bytes, an upper one with a sign and a
// lower one without.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "rounded.h"
#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && \
    defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(DYNAMIC_LORA_NO_MATRIX_UNIT)
#define DYNAMIC_LORA_MATRIX_UNIT 1
#else
#define DYNAMIC_LORA_MATRIX_UNIT 0
#endif

namespace dynamic_lora {

constexpr bool kMatrixUnit = DYNAMIC_LORA_MATRIX_UNIT;
constexpr int64_t kUnitRows = 16;                // rows, and outputs, of a tile
constexpr int64_t kUnitBlock = 2 * kUnitRows;    // rows that are multiplied together
constexpr int64_t kUnitDepth = 32;               // inputs in bfloat16 of a tile
constexpr int64_t kUnitBytes = 64;               // inputs in eight bits of a tile

// Rows cut into blocks of one size, but for the last.
struct WholeBlocks {
  int64_t count, rows, size;

  WholeBlocks(int64_t rows, int64_t size)
      : count((rows + size - 1) / size), rows(rows), size(size) {}

  int64_t first(int64_t block) const { return std::min(block * size, rows); }
};

// Rows that copies of inputs have room for: whole tiles of them are read.
inline int64_t whole_tiles(int64_t rows) {
  return kMatrixUnit ? (rows + kUnitRows - 1) / kUnitRows * kUnitRows : rows;
}

#if DYNAMIC_LORA_MATRIX_UNIT

// Has memory hold what was written to it: the compiler does not know what tiles are read from.
inline void written() { asm volatile("" ::: "memory"); }

// A thread's unit, set up for tiles of 16 rows of 64 bytes as long as this lives.
class MatrixUnit {
 public:
  MatrixUnit() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    written();
    _tile_loadconfig(&layout);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Asks for the lines that a step of so many bytes will read later.
inline void ask_lines(const char* line, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(line + i, 0, 2);
}

// Sums of up to kUnitBlock rows and two tiles of outputs, in tiles 0 to 3 of the unit.
inline void begin_unit() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Stores them to y, which has room for whole tiles.
inline void end_unit(float* y, bool both) {
  constexpr int64_t kWide = 2 * kUnitRows, kStride = kWide * sizeof(float);
  _tile_stored(0, y, kStride);
  _tile_stored(1, y + kUnitRows, kStride);
  if (both) {
    _tile_stored(2, y + kUnitRows * kWide, kStride);
    _tile_stored(3, y + kUnitRows * kWide + kUnitRows, kStride);
  }
}

// y [rows, 2 * kUnitRows] = x [rows, depth] times a panel [depth / 2, 2 * kUnitRows, 2], for up to
// kUnitBlock rows. x has whole tiles of rows, which go on with zeros to a whole tile; y has room
// for whole tiles. `step` bytes are asked for from `ahead` on for each kUnitDepth inputs.
inline void unit_tile(const int16_t* x, int64_t ldx, int64_t rows, const BFloat16* panel,
                      int64_t depth, float* y, const char* ahead, int64_t step) {
  constexpr int64_t kWide = 2 * kUnitRows, kStride = kWide * sizeof(float);
  const int64_t x_stride = ldx * sizeof(int16_t);
  const bool both = rows > kUnitRows;
  begin_unit();
  const auto multiply = [&](int64_t i, const BFloat16* weights) __attribute__((always_inline)) {
    _tile_loadd(4, weights, kStride);
    _tile_loadd(5, weights + kWide, kStride);
    _tile_loadd(6, x + i, x_stride);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 6, 5);
    if (both) {
      _tile_loadd(7, x + kUnitRows * ldx + i, x_stride);
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
  };
  int64_t i = 0;
  for (; i + kUnitDepth <= depth; i += kUnitDepth, ahead += step) {
    ask_lines(ahead, step);
    multiply(i, panel + i * kWide);
  }
  if (i < depth) {
    // What is behind the panel is somebody else's, and no number times nothing is no number.
    alignas(64) BFloat16 last[kUnitDepth * kWide] = {};
    std::memcpy(last, panel + i * kWide, (depth - i) * kWide * sizeof(BFloat16));
    written();
    multiply(i, last);
  }
  end_unit(y, both);
}

// Adds x [rows, depth] of one group, in bytes with the lower ones `plane` behind the upper ones,
// times a panel slice [depth / 4, 2 * kUnitRows, 4] to y [rows, 2 * kUnitRows], or, where that is
// `fresh`, writes it there; for up to kUnitRows rows. x has room for a whole tile.
inline void bytes_tile(const int8_t* x, int64_t ldx, int64_t plane, const float* scales,
                       int64_t groups, int64_t rows, const int8_t* panel, int64_t depth, bool fresh,
                       float* y, const char* ahead, int64_t step) {
  constexpr int64_t kWide = 2 * kUnitRows, kStride = kWide * 4;
  alignas(64) int32_t sums[2][kUnitRows * kWide];  // of the upper bytes and the lower
  begin_unit();
  for (int64_t i = 0; i < depth; i += kUnitBytes, ahead += step) {
    ask_lines(ahead, step);
    _tile_loadd(4, panel + i * kWide, kStride);
    _tile_loadd(5, panel + i * kWide + kStride / 2, kStride);
    _tile_loadd(6, x + i, ldx);
    _tile_loadd(7, x + plane + i, ldx);
    _tile_dpbssd(0, 6, 4);
    _tile_dpbssd(1, 6, 5);
    _tile_dpbusd(2, 7, 4);
    _tile_dpbusd(3, 7, 5);
  }
  _tile_stored(0, sums[0], kStride);
  _tile_stored(1, sums[0] + kUnitRows, kStride);
  _tile_stored(2, sums[1], kStride);
  _tile_stored(3, sums[1] + kUnitRows, kStride);
  for (int64_t row = 0; row < rows; row++) {
    const Vec scale = all(scales[row * groups]);
    UNROLL
    for (int64_t c = row * kWide; c < (row + 1) * kWide; c += kLanes) {
      const IntVec upper = reinterpret_cast<const IntVec&>(sums[0][c]);
      const IntVec lower = reinterpret_cast<const IntVec&>(sums[1][c]);
      const Vec sum = __builtin_convertvector((upper << 8) + lower, Vec) * scale;
      store(y + c, fresh ? sum : load(y + c) + sum);
    }
  }
}

// Rounds row number `row`, x [k], to sixteen bits, as `round_row` does, in bytes with the lower ones
// `plane` behind the upper ones.
inline void round_row_to_bytes(const float* x, int64_t k, int64_t plane, int64_t row,
                               InputCopies& out) {
  float* scales = out.scales.data() + row * InputCopies::groups(k);
  for (int64_t start = 0; start < k; start += kGroup) {
    const int64_t count = std::min(kGroup, k - start);
    alignas(64) int16_t whole[kGroup];
    *scales++ = round_group(x + start, count, whole).scale;
    int8_t* to = out.bytes.data() + row * row_stride<int8_t>(k) + start;
    for (int64_t i = 0; i < count; i += 2 * kLanes) {
      const __m512i values = _mm512_load_si512(whole + i);
      const auto put_bytes = [](int8_t* place, __m512i wide) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm512_cvtepi16_epi8(wide));
      };
      put_bytes(to + i, _mm512_srai_epi16(values, 8));
      put_bytes(to + plane + i, values);
    }
  }
}

#else

struct MatrixUnit {};

// Never called.
inline void unit_tile(const int16_t*, int64_t, int64_t, const BFloat16*, int64_t, float*,
                      const char*, int64_t) {}
inline void bytes_tile(const int8_t*, int64_t, int64_t, const float*, int64_t, int64_t,
                       const int8_t*, int64_t, bool, float*, const char*, int64_t) {}
inline void round_row_to_bytes(const float*, int64_t, int64_t, int64_t, InputCopies&) {}

#endif

}  // namespace dynamic_lora
