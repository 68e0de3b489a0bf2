// The weight of a linear layer in panels, and what products of it make of their inputs first.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "eight_bits.h"
#include "matrix_unit.h"
#include "rounded.h"
#include "team.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int kPanelVecs = 2;
constexpr int kWidth = kPanelVecs * kLanes;
constexpr int64_t kUnspreadRows = 4;  // up to which rows of floats are read as they lie
constexpr int64_t kSetStride = 4096;  // bytes after which the sets of a first-level cache repeat

// What the panels of a weight hold: [k][kWidth] of floats, [ceil(k / n)][kWidth][n] of the others,
// with n = 2, or, for bytes on the matrix unit and beside inputs in eight bits, 4.
enum Format : int64_t { kFloats, kBytes, kBFloat16, kAllBytes };
constexpr int kBytesTogether = kMatrixUnit ? 4 : 2;

// Inputs that a panel has room for, zeros behind the last.
inline int64_t panel_depth(Format format, int64_t k) {
  if (format == kFloats) return k;
  if (format == kBytes && kMatrixUnit) return (k + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
  if (format == kAllBytes) return whole_fours(k);
  return even(k);
}

// Where the outputs of a panel begin. Of two halves, the panels lie in turns.
inline int64_t panel_column(int64_t number, int64_t n, bool halves) {
  return halves ? number % 2 * (n / 2) + number / 2 * kWidth : number * kWidth;
}

// Whether the processor multiplies pairs of bfloat16 faster than floats. Intel's vector units begin
// such an instruction every second cycle, and two fused multiply-adds in each: there only the matrix
// unit gains.
inline bool pairs_pay() {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  __builtin_cpu_init();
  return kMatrixUnit || !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// How many want inputs to be rounded neither to eight bits nor to bfloat16 in calls that begin now:
// those who compare two ways to compute.
static std::atomic<int64_t> whole_inputs{0};

// The rows of one call, and how its products round them: asked for once, for all of a call must
// agree on what lies where.
struct Batch {
  int64_t rows;
  bool whole, in_bfloat16;

  explicit Batch(int64_t rows)
      : rows(rows),
        whole(whole_inputs.load(std::memory_order_relaxed) > 0),
        in_bfloat16(!whole && pairs_pay()) {}
};

// The weight of a linear layer, in panels.
struct Projection {
  const void* packed;
  const float* scale;  // [n], of both formats in bytes; else null
  const float* bias;   // [n] or null
  int64_t n, k;
  int64_t format;
  int64_t halves;  // whether panels are of either half of the outputs, in turns

  // Whether products round their inputs to bfloat16 first.
  bool rounds_to_bfloat16(const Batch& batch) const {
    return format == kBFloat16 && batch.in_bfloat16;
  }

  // Whether products round their inputs first.
  bool rounds(const Batch& batch) const {
    return format == kBytes || format == kAllBytes || rounds_to_bfloat16(batch);
  }

  // Whether products of rows of floats spread them first. With AVX-512 they gain by it, else
  // where a column of a tile's rows falls into one set of the first-level cache, which it is too
  // many for.
  bool spreads(const Batch& batch) const {
    const bool crowded = k * sizeof(float) % kSetStride == 0;
    return !rounds(batch) && batch.rows > kUnspreadRows && (kLanes == 16 || crowded);
  }

  // Whether products read copies of their inputs.
  bool copies(const Batch& batch) const { return rounds(batch) || spreads(batch); }

  // Bytes from the upper bytes of inputs to the lower ones, on the matrix unit.
  int64_t plane(int64_t rows) const { return whole_tiles(rows) * row_stride<int8_t>(k); }

  // Has room for what products make of their inputs first.
  void make_room(const Batch& batch, InputCopies& copies) const {
    if (format == kBytes && kMatrixUnit) {
      have_room(copies.bytes, 2 * plane(batch.rows));
      have_room(copies.scales, batch.rows * InputCopies::groups(k));
    } else if (format == kAllBytes)
      make_eight_bit_room(batch.whole ? 2 * batch.rows : batch.rows, k, copies);
    else if (rounds(batch))
      copies.make_room(whole_tiles(batch.rows), k);
    else if (spreads(batch))
      have_room(copies.spread, batch.rows * spread_stride(k));
  }
};

// Makes of row number `row`, x [k], what the product reads in its place, if it does; `copies` has
// had room made for it by the projection.
inline void copy_row(const float* x, const Projection& p, const Batch& batch, int64_t row,
                     InputCopies& copies) {
  if (p.format == kBytes && kMatrixUnit)
    round_row_to_bytes(x, p.k, p.plane(batch.rows), row, copies);
  else if (p.format == kBytes)
    round_row(x, p.k, row, copies);
  else if (p.format == kAllBytes)
    round_row_to_eight_bits(x, p.k, row, batch.whole ? batch.rows + row : -1, copies);
  else if (p.rounds_to_bfloat16(batch))
    round_row_to_bfloat16(x, p.k, row, copies);
  else if (p.spreads(batch))
    std::memcpy(copies.spread.data() + row * spread_stride(p.k), x, p.k * sizeof(float));
}

// The same for all rows x [rows, k]. Called by a whole team of threads.
inline void share_copying(const float* x, const Projection& p, const Batch& batch,
                          InputCopies& copies) {
  if (!p.copies(batch)) return;
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < batch.rows; row++)
    copy_row(x + row * p.k, p, batch, row, copies);
  meet();
}

}  // namespace dynamic_lora
