// What products read: rows in every form, each for its panels of weights, and how many rows of it
// are multiplied together.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "bfloat16.h"
#include "eight_bits.h"
#include "matrix_unit.h"
#include "projection.h"
#include "rounded.h"
#include "vectors.h"

namespace dynamic_lora {

// Sums, two weights and one input fit into 16 (AVX2) or 32 (AVX-512) registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// Floats need no register for what is widened.
constexpr int kFloatRows = kLanes == 16 ? 14 : 6;
// Bytes between what is asked for into the first-level cache and into the second.
constexpr int64_t kFurther = 1024;

// Adds x [Rows, depth] times a panel slice [depth, kWidth] to y, or, where that is `fresh`, writes
// it there.
template <int Rows>
__attribute__((noinline)) void tile(const float* x, int64_t ldx, const float* panel, int64_t depth,
                                    bool fresh, float* y, int64_t ldy, Ahead ahead) {
  Vec sums[Rows][kPanelVecs];
  begin_sums(fresh, y, ldy, sums);
  for (int64_t i = 0; i < depth; i++) {
    Vec weights[kPanelVecs];
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) weights[v] = load(panel + i * kWidth + v * kLanes);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const float input = x[r * ldx + i];
      UNROLL
      for (int v = 0; v < kPanelVecs; v++) sums[r][v] += input * weights[v];
    }
    if constexpr (kLanes == 16)
      ahead.ask_twice(kFurther);
    else
      ahead.ask();
  }
  end_sums(sums, y, ldy);
}

// Calls `act` with a number of rows, up to Most, as a type.
template <int Most, typename Act>
void with_rows(int64_t rows, const Act& act) {
  if constexpr (Most > 0) {
    if (rows == Most)
      act(std::integral_constant<int, Most>{});
    else
      with_rows<Most - 1>(rows, act);
  }
}

// How products are computed in registers: how many rows together, how far ahead a panel is asked
// for that is read only once, and what a thread sets up before its first. Up to `kSharing` blocks of
// rows go through a panel slice by slice, if that is more than one.
struct InRegisters {
  static constexpr int64_t kRows = kTileRows, kAhead = 32, kSharing = 1, kShared = 0;
  using Blocks = RowBlocks;
  struct Scope {};
};

// The same where the sums of a group of inputs are kept beside those of all groups.
struct ByGroups : InRegisters {
  static constexpr int64_t kRows = kFourRows;
};

// The same for weights that are multiplied as they are read.
struct AsFloats : InRegisters {
  static constexpr int64_t kRows = kFloatRows, kSharing = kLanes == 16 ? 4 : 1;
  // Inputs of a slice: it, the next one and the slice's inputs stay in the first-level cache.
  static constexpr int64_t kShared = 96;
};

// The same for the matrix unit.
struct OnUnit {
  static constexpr int64_t kRows = kUnitBlock, kAhead = 128, kSharing = 1, kShared = 0;
  using Blocks = WholeBlocks;
  using Scope = MatrixUnit;
};

// The same where sums of two kinds are kept in it.
struct TwiceOnUnit : OnUnit {
  static constexpr int64_t kRows = kUnitRows;
};

// x [m, k] in float32, for panels in float32.
struct WholeInputs {
  using Way = AsFloats;
  using Weight = float;
  static constexpr int64_t kSlice = 2048;  // inputs summed per pass: a slice of a panel stays in L2
  const float* x;
  int64_t k, ldx;

  int64_t depth() const { return k; }

  void add(int64_t rows, int64_t row, int64_t i, const float* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    with_rows<kFloatRows>(rows, [&](auto count) {
      tile<count()>(x + row * ldx + i, ldx, slice, depth, i == 0, sums, kWidth, ahead);
    });
  }
};

// x [m, k] in sixteen bits, for panels of pairs of weights in eight.
struct RoundedInputs {
  using Way = InRegisters;
  using Weight = int8_t;
  static constexpr int64_t kSlice = kGroup;
  const int16_t* values;
  const float* scales;
  int64_t k;

  int64_t depth() const { return even(k); }

  void add(int64_t rows, int64_t row, int64_t i, const int8_t* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    const int64_t groups = InputCopies::groups(k), ldx = row_stride<int16_t>(k);
    with_rows<kTileRows>(rows, [&](auto count) {
      pair_tile<count(), kPanelVecs>(values + row * ldx + i, ldx,
                                     scales + row * groups + i / kGroup, groups, slice, depth,
                                     i == 0, sums, kWidth, {ahead.line, 2 * ahead.step});
    });
  }
};

// The same on the matrix unit, in two bytes.
struct ByteInputs {
  using Way = TwiceOnUnit;
  using Weight = int8_t;
  static constexpr int64_t kSlice = kGroup;
  const int8_t* values;
  const float* scales;
  int64_t plane, k;

  int64_t depth() const { return panel_depth(kBytes, k); }

  void add(int64_t rows, int64_t row, int64_t i, const int8_t* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    const int64_t groups = InputCopies::groups(k), ldx = row_stride<int8_t>(k);
    bytes_tile(values + row * ldx + i, ldx, plane, scales + row * groups + i / kGroup, groups, rows,
               slice, depth, i == 0, sums, ahead.line, kUnitBytes * ahead.step);
  }
};

// x [m, k] in eight bits, for panels of fours of weights in eight; `whole`: behind its rows those
// of what rounding has left.
struct EightBitInputs {
  using Way = ByGroups;
  using Weight = uint8_t;
  static constexpr int64_t kSlice = INT64_MAX / 2;  // all inputs: a panel is small
  const InputCopies& copies;
  int64_t k;
  Batch batch;

  int64_t depth() const { return whole_fours(k); }

  void add(int64_t rows, int64_t row, int64_t, const uint8_t* panel, int64_t depth, float* sums,
           Ahead ahead) const {
    add_rows(rows, row, panel, depth, true, sums, {ahead.line, 4 * ahead.step});
    if (batch.whole) add_rows(rows, batch.rows + row, panel, depth, false, sums, {ahead.line, 0});
  }

  void add_rows(int64_t rows, int64_t row, const uint8_t* panel, int64_t depth, bool fresh,
                float* sums, Ahead ahead) const {
    const int64_t groups = few_groups(k), ldx = row_stride<int8_t>(k);
    with_rows<kFourRows>(rows, [&](auto count) {
      four_tile<count(), kPanelVecs>(copies.bytes.data() + row * ldx, ldx,
                                     copies.scales.data() + row * groups,
                                     copies.starts.data() + row, groups, panel, depth,
                                     fresh, sums, ahead);
    });
  }
};

// x [m, k] in float32, for panels in bfloat16.
struct WholeBFloat16Inputs {
  using Way = InRegisters;
  using Weight = BFloat16;
  static constexpr int64_t kSlice = 2048;
  const float* x;
  int64_t k, ldx;

  int64_t depth() const { return even(k); }

  void add(int64_t rows, int64_t row, int64_t i, const BFloat16* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    with_rows<kTileRows>(rows, [&](auto count) {
      widening_tile<count(), kPanelVecs>(x + row * ldx + i, ldx, slice, std::min(depth, k - i),
                                         i == 0, sums, kWidth, {ahead.line, 2 * ahead.step});
    });
  }
};

// x [m, k] in bfloat16 too, where that pays.
struct BFloat16Inputs {
  using Way = InRegisters;
  using Weight = BFloat16;
  static constexpr int64_t kSlice = 2048;
  const int16_t* values;
  int64_t k;

  int64_t depth() const { return even(k); }

  void add(int64_t rows, int64_t row, int64_t i, const BFloat16* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    const int64_t ldx = row_stride<int16_t>(k);
    with_rows<kTileRows>(rows, [&](auto count) {
      bfloat16_tile<count(), kPanelVecs>(values + row * ldx + i, ldx, slice, depth, i == 0, sums,
                                         kWidth, {ahead.line, 2 * ahead.step});
    });
  }
};

// The same on the matrix unit.
struct UnitInputs {
  using Way = OnUnit;
  using Weight = BFloat16;
  static constexpr int64_t kSlice = INT64_MAX / 2;  // all inputs: sums stay in the unit
  const int16_t* values;
  int64_t k;

  int64_t depth() const { return even(k); }

  void add(int64_t rows, int64_t row, int64_t, const BFloat16* panel, int64_t depth, float* sums,
           Ahead ahead) const {
    const int64_t ldx = row_stride<int16_t>(k);
    unit_tile(values + row * ldx, ldx, rows, panel, depth, sums, ahead.line,
              kUnitDepth * ahead.step);
  }
};

}  // namespace dynamic_lora
