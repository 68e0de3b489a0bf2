// y = x W^T + bias for a few to a few hundred rows of x, from a packed W, in float32, for a W in
// bfloat16 (`brain.h`), or, for one in eight bits, in integers (`rounded.h`); these two on the
// processor's matrix unit where it has one (`matrix_unit.h`).
//
// W [n, k] is packed in panels of kWidth outputs (see `Projection`), so that a
// panel is read once, in order, for all rows. Up to kTileRows rows are summed in
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

#include "brain.h"
#include "matrix_unit.h"
#include "rounded.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int kPanelVecs = 2;
constexpr int kWidth = kPanelVecs * kLanes;
// Sums, two weights and one input fit into 16 (AVX2) or 32 (AVX-512) registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// Floats need no register for what is widened.
constexpr int kFloatRows = kLanes == 16 ? 14 : 6;
constexpr int64_t kUncrowdedRows = 4;
constexpr int64_t kSetStride = 4096;  // bytes after which the sets of a first-level cache repeat

// What the panels of a weight hold: [k][kWidth] of floats, [ceil(k / n)][kWidth][n] of the others,
// with n = 2, or, for bytes on the matrix unit, 4.
enum Format : int64_t { kFloats, kBytes, kBrains };
constexpr int64_t kBytesTogether = kMatrixUnit ? 4 : 2;

// Inputs that a panel has room for, zeros behind the last.
inline int64_t panel_depth(Format format, int64_t k) {
  if (format == kFloats) return k;
  if (format == kBytes && kMatrixUnit) return (k + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
  return even(k);
}

// The weight of a linear layer, in panels.
struct Projection {
  const void* packed;
  const float* scale;  // [n], of bytes; else null
  const float* bias;   // [n] or null
  int64_t n, k;
  int64_t format;

  // Whether products round their inputs to bfloat16 first.
  bool rounds_to_brains() const { return format == kBrains && brain_inputs; }

  // Whether products round their inputs first.
  bool rounds() const { return format == kBytes || rounds_to_brains(); }

  // Bytes from the upper bytes of inputs to the lower ones, on the matrix unit.
  int64_t plane(int64_t rows) const { return whole_tiles(rows) * row_stride<int8_t>(k); }

  // Has room for what products of so many rows make of their inputs first.
  void make_room(int64_t rows, InputCopies& copies) const {
    if (format == kBytes && kMatrixUnit) {
      have_room(copies.bytes, 2 * plane(rows));
      have_room(copies.scales, rows * InputCopies::groups(k));
    } else if (rounds())
      copies.make_room(whole_tiles(rows), k);
    else if (crowded(rows, k))
      have_room(copies.floats, rows * row_stride<float>(k));
  }

  // Whether rows of floats are so far apart that a column of a tile's falls into one set of the
  // first-level cache, which it is too many for: they are copied first.
  static bool crowded(int64_t rows, int64_t k) {
    return rows > kUncrowdedRows && k * sizeof(float) % kSetStride == 0;
  }
};

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
// for that is read only once, and what a thread sets up before its first.
struct InRegisters {
  static constexpr int64_t kRows = kTileRows, kAhead = 32;
  using Blocks = RowBlocks;
  struct Scope {};
};

// The same for weights that are multiplied as they are read.
struct AsFloats : InRegisters {
  static constexpr int64_t kRows = kFloatRows;
};

// The same for the matrix unit.
struct OnUnit {
  static constexpr int64_t kRows = kUnitBlock, kAhead = 128;
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

// x [m, k] in sixteen bits, for panels of pairs of weights in eight, or widened to sixteen.
struct RoundedInputs {
  using Way = InRegisters;
  using Weight = int8_t;
  static constexpr int64_t kSlice = kGroup;
  static constexpr int64_t kPreparedRows = 6 * kTileRows;
  const int16_t* values;
  const float* scales;
  int64_t k;

  int64_t depth() const { return even(k); }

  template <typename Wide>
  void add(int64_t rows, int64_t row, int64_t i, const Wide* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    const int64_t groups = InputCopies::groups(k), ldx = row_stride<int16_t>(k);
    with_rows<kTileRows>(rows, [&](auto count) {
      pair_tile<count(), kPanelVecs>(values + row * ldx + i, ldx,
                                     scales + row * groups + i / kGroup, groups, slice, depth,
                                     i == 0, sums, kWidth, {ahead.line, 2 * ahead.step});
    });
  }

  // For many blocks of rows a panel is widened once.
  const int16_t* prepared(const int8_t* panel) const {
    static thread_local Lines<int16_t> wide;
    const int64_t size = depth() * kWidth;
    have_room(wide, size);
    for (int64_t i = 0; i < size; i += 2 * kLanes)
      *reinterpret_cast<PairVec*>(wide.data() + i) = pairs(panel + i);
    return wide.data();
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

// x [m, k] in float32, for panels in bfloat16.
struct WholeBrainInputs {
  using Way = InRegisters;
  using Weight = Brain;
  static constexpr int64_t kSlice = 2048;
  const float* x;
  int64_t k, ldx;

  int64_t depth() const { return even(k); }

  void add(int64_t rows, int64_t row, int64_t i, const Brain* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    with_rows<kTileRows>(rows, [&](auto count) {
      widening_tile<count(), kPanelVecs>(x + row * ldx + i, ldx, slice, std::min(depth, k - i),
                                         i == 0, sums, kWidth, {ahead.line, 2 * ahead.step});
    });
  }
};

// x [m, k] in bfloat16 too, where the processor multiplies that.
struct BrainInputs {
  using Way = InRegisters;
  using Weight = Brain;
  static constexpr int64_t kSlice = 2048;
  const int16_t* values;
  int64_t k;

  int64_t depth() const { return even(k); }

  void add(int64_t rows, int64_t row, int64_t i, const Brain* slice, int64_t depth, float* sums,
           Ahead ahead) const {
    const int64_t ldx = row_stride<int16_t>(k);
    with_rows<kTileRows>(rows, [&](auto count) {
      brain_tile<count(), kPanelVecs>(values + row * ldx + i, ldx, slice, depth, i == 0, sums,
                                      kWidth, {ahead.line, 2 * ahead.step});
    });
  }
};

// The same on the matrix unit.
struct UnitInputs {
  using Way = OnUnit;
  using Weight = Brain;
  static constexpr int64_t kSlice = INT64_MAX / 2;  // all inputs: sums stay in the unit
  const int16_t* values;
  int64_t k;

  int64_t depth() const { return even(k); }

  void add(int64_t rows, int64_t row, int64_t, const Brain* panel, int64_t depth, float* sums,
           Ahead ahead) const {
    const int64_t ldx = row_stride<int16_t>(k);
    unit_tile(values + row * ldx, ldx, rows, panel, depth, sums, ahead.line,
              kUnitDepth * ahead.step);
  }
};

// Whether panels are prepared once where rows are many: such inputs have `kPreparedRows`, beyond
// which they are, and `prepared`.
template <typename Inputs, typename = void>
constexpr bool prepares = false;
template <typename Inputs>
constexpr bool prepares<Inputs, std::void_t<decltype(Inputs::kPreparedRows)>> = true;

// Nothing is added to a product but its bias.
struct NoDeltas {
  void begin(int64_t, int64_t) {}
  void add(float*, int64_t, int64_t) {}
};

// What a product is made of beside its size. `Extra` adds to the sums of a panel before
// they are stored: it is told of a panel by `begin` (column, width), and then asked for each of
// its blocks of rows by `add` (sums [rows, kWidth], row, rows).
template <typename Inputs, typename Extra>
struct Product {
  using Weight = typename Inputs::Weight;
  using Way = typename Inputs::Way;
  Inputs inputs;
  const Weight* packed;
  const float* scale;     // [n] or null
  const float* bias;      // [n] or null
  const float* residual;  // [m, n] or null
  float* y;               // [m, n]
  int64_t m, n;
  Extra extra;

  int64_t panels() const { return (n + kWidth - 1) / kWidth; }

  // Scale, bias, deltas and residual, for a block of rows of a panel.
  void finish(float* sums, int64_t row, int64_t rows, int64_t column, int64_t width) {
    if (width < kWidth) return finish_last(sums, row, rows, column, width);
    if (scale || bias)
      for (int64_t r = 0; r < rows; r++) {
        UNROLL
        for (int c = 0; c < kWidth; c += kLanes) {
          Vec value = load(sums + r * kWidth + c);
          if (scale) value *= load(scale + column + c);
          if (bias) value += load(bias + column + c);
          store(sums + r * kWidth + c, value);
        }
      }
    extra.add(sums, row, rows);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t first = (row + r) * n + column;
      UNROLL
      for (int c = 0; c < kWidth; c += kLanes) {
        const Vec value = load(sums + r * kWidth + c);
        store(y + first + c, residual ? value + load(residual + first + c) : value);
      }
    }
  }

  // The last panel may be narrower.
  __attribute__((noinline)) void finish_last(float* sums, int64_t row, int64_t rows,
                                             int64_t column, int64_t width) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        float& value = sums[r * kWidth + c];
        if (scale) value *= scale[column + c];
        if (bias) value += bias[column + c];
      }
    extra.add(sums, row, rows);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        const int64_t place = (row + r) * n + column + c;
        y[place] = sums[r * kWidth + c] + (residual ? residual[place] : 0.0f);
      }
  }

  // Panel `number`, whose weights may have been widened to another type meanwhile.
  template <typename Wide>
  void multiply(const Wide* panel, int64_t number) {
    const int64_t column = number * kWidth, width = std::min<int64_t>(kWidth, n - column);
    const typename Way::Blocks blocks(m, Way::kRows);
    const int64_t depth = inputs.depth(), bytes = kWidth * sizeof(Weight);
    const auto* next = reinterpret_cast<const char*>(packed + (number + 1) * depth * kWidth);
    const int64_t portion = depth * bytes / blocks.count;
    const int64_t step = (bytes + blocks.count - 1) / blocks.count;
    extra.begin(column, width);
    for (int64_t b = 0; b < blocks.count; b++) {
      const int64_t row = blocks.first(b), rows = blocks.first(b + 1) - row;
      alignas(64) float sums[Way::kRows * kWidth];  // begun by the first slice
      for (int64_t i = 0; i < depth; i += Inputs::kSlice) {
        const Wide* slice = panel + i * kWidth;
        // Read once, a panel runs ahead of itself; else each block asks for a part of the next.
        const Ahead ahead =
            blocks.count == 1
                ? Ahead{reinterpret_cast<const char*>(slice) + Way::kAhead * kLineBytes, bytes}
                : Ahead{next + portion * b + i * step, step};
        inputs.add(rows, row, i, slice, std::min(Inputs::kSlice, depth - i), sums, ahead);
      }
      finish(sums, row, rows, column, width);
    }
  }

  // Called by a whole team of threads, each with a Product of its own.
  void share() {
    const int64_t size = inputs.depth() * kWidth;
    [[maybe_unused]] const typename Way::Scope scope;
#pragma omp for schedule(guided, 1)
    for (int64_t j = 0; j < panels(); j++) {
      if constexpr (prepares<Inputs>) {
        if (m > Inputs::kPreparedRows) {
          multiply(inputs.prepared(packed + j * size), j);
          continue;
        }
      }
      multiply(packed + j * size, j);
    }
  }
};

// Copies x [rows, k] to rows that are `row_stride` apart. Called by a whole team.
inline void share_spreading(const float* x, int64_t rows, int64_t k, InputCopies& out) {
  const int64_t stride = row_stride<float>(k);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++)
    std::memcpy(out.floats.data() + row * stride, x + row * k, k * sizeof(float));
}

// Makes of x [m, k] what the product reads in its place, if it does; `copies` has had room made
// for it by the projection. Called by a whole team of threads.
inline void share_copying(const float* x, const Projection& p, int64_t m, InputCopies& copies) {
  if (p.format == kBytes && kMatrixUnit)
    share_byte_rounding(x, m, p.k, p.plane(m), copies);
  else if (p.format == kBytes)
    share_rounding(x, m, p.k, copies);
  else if (p.rounds_to_brains())
    share_brain_rounding(x, m, p.k, copies);
  else if (Projection::crowded(m, p.k))
    share_spreading(x, m, p.k, copies);
}

// y [m, n] from x [m, k], of which there are the `copies` of `share_copying`, plus `residual`
// [m, n] if that is not null. Called by a whole team.
template <typename Extra>
void share_product(const float* x, const Projection& p, const float* residual, float* y, int64_t m,
                   const Extra& extra, const InputCopies& copies) {
  if (m == 0) return;
  const auto multiply = [&](const auto& inputs) {
    using Inputs = std::decay_t<decltype(inputs)>;
    const auto* packed = static_cast<const typename Inputs::Weight*>(p.packed);
    Product<Inputs, Extra>{inputs, packed, p.scale, p.bias, residual, y, m, p.n, extra}
        .share();
  };
  if (p.format == kBytes) {
    const float* scales = copies.scales.data();
    if constexpr (kMatrixUnit)
      return multiply(ByteInputs{copies.bytes.data(), scales, p.plane(m), p.k});
    else
      return multiply(RoundedInputs{copies.values.data(), scales, p.k});
  }
  if (p.rounds_to_brains()) {
    using Inputs = std::conditional_t<kMatrixUnit, UnitInputs, BrainInputs>;
    return multiply(Inputs{copies.values.data(), p.k});
  }
  int64_t ldx = p.k;
  if (Projection::crowded(m, p.k)) x = copies.floats.data(), ldx = row_stride<float>(p.k);
  if (p.format == kFloats) return multiply(WholeInputs{x, p.k, ldx});
  multiply(WholeBrainInputs{x, p.k, ldx});
}

}  // namespace dynamic_lora
