// y = x W^T + bias for a few to a few hundred rows of x, from a packed W, in float32, for a W in
// bfloat16 (`bfloat16.h`), or, for one in eight bits, in integers (`rounded.h`); these two on the
// processor's matrix unit where it has one (`matrix_unit.h`). Or with both in eight bits
// (`eight_bits.h`).
//
// W [n, k] is packed in panels of kWidth outputs (see `Projection`), so that a
// panel is read once, in order, for all rows. As many rows as registers have room
// for are summed in them at a time (the register tiling of Goto & van de Geijn
// 2008); while they are, the next panel is asked for, so that waiting for memory and
// computing overlap. Threads take panels as they finish: a core that something
// else disturbs does not hold the other up.
//
// Where outputs are a gate and what it lets through, the panels of the two may lie in turns. Then
// a thread has the sums of both at hand, and activates them before it writes any.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bfloat16.h"
#include "eight_bits.h"
#include "matrix_unit.h"
#include "rounded.h"
#include "team.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int kPanelVecs = 2;
constexpr int kWidth = kPanelVecs * kLanes;
// Sums, two weights and one input fit into 16 (AVX2) or 32 (AVX-512) registers.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// Floats need no register for what is widened.
constexpr int kFloatRows = kLanes == 16 ? 14 : 6;
constexpr int64_t kUnspreadRows = 4;  // up to which rows of floats are read as they lie
// Bytes between what is asked for into the first-level cache and into the second.
constexpr int64_t kFurther = 1024;
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
                                     copies.starts.data() + row * groups, groups, panel, depth,
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

// Nothing is added to a product but its bias.
struct NoDeltas {
  void begin(int64_t, int64_t) {}
  void add(float*, int64_t, int64_t) {}
};

// Where a product goes: y [m, n] = product + residual.
struct Plain {
  const float* residual;  // [m, n] or null
  float* y;               // [m, n]
};

// Where it goes activated: silu(gate) * up, the two halves of the product, to y [m, n / 2], or laid
// out as inputs are, spread or rounded to bfloat16. Each may be null.
struct Gated {
  float* y;
  float* spread;
  int16_t* rounded;

  // Stores activated outputs of a row of `width`, from `column` on: kLanes, or twice as many.
  template <typename... Vecs>
  void put(int64_t row, int64_t width, int64_t column, Vecs... activated) const {
    if (y) store_each(y + row * width + column, activated...);
    if (spread) store_each(spread + row * spread_stride(width) + column, activated...);
    if (rounded) store_bfloat16(rounded + row * row_stride<int16_t>(width) + column, activated...);
  }
};

// The highest output of each row, of those that one thread has seen: lane by lane, how high and in
// which column (less the lane); `odd` where one was no number.
struct Tops {
  Lines<float> heights;   // [rows, kLanes]
  Lines<int32_t> columns, odd;

  void begin(int64_t rows) {
    heights.assign(rows * kLanes, -INFINITY);
    columns.assign(rows * kLanes, 0);
    odd.assign(rows * kLanes, 0);
  }

  // Outputs [kWidth] of a row, from `column` on.
  void look(int64_t row, const float* outputs, int64_t column) {
    const int64_t place = row * kLanes;
    auto& found = reinterpret_cast<IntVec&>(columns[place]);
    auto& strange = reinterpret_cast<IntVec&>(odd[place]);
    Vec top = load(&heights[place]);
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) {
      const Vec output = load(outputs + v * kLanes);
      const IntVec higher = output > top, at = static_cast<int32_t>(column + v * kLanes) - IntVec{};
      top = higher ? output : top;
      found = higher ? at : found;
      strange |= output != output;
    }
    store(&heights[place], top);
  }
};

// Of each panel of outputs and each row, the highest and the sum of e^(output - highest): what
// log-probabilities need. Each panel has a place of its own, so that the same outputs add up to the
// same total whichever threads they come from.
struct Masses {
  Lines<float> heights, sums;  // [panels, stride]
  int64_t stride = 0;

  void make_room(int64_t panels, int64_t rows) {
    stride = (rows + kLanes - 1) / kLanes * kLanes;
    have_room(heights, panels * stride);
    have_room(sums, panels * stride);
  }

  // Outputs [kWidth] of a row.
  void weigh(int64_t row, const float* outputs, int64_t panel) {
    Vec tops = load(outputs);
    UNROLL
    for (int v = 1; v < kPanelVecs; v++) {
      const Vec next = load(outputs + v * kLanes);
      tops = next > tops ? next : tops;
    }
    float top = tops[0];
    for (int lane = 1; lane < kLanes; lane++) top = std::max(top, tops[lane]);
    Vec total{};
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) total += exp_negative(load(outputs + v * kLanes) - top);
    heights[panel * stride + row] = top;
    // Of nothing but minus infinity: no difference to itself.
    sums[panel * stride + row] = top == -INFINITY ? 0.0f : sum(total);
  }

  // The sums of e^(output - top) of rows [kLanes], from `row` on, over all panels.
  void total(int64_t row, int64_t panels, const float* tops, double* totals) const {
    constexpr int64_t kTogether = 64;  // so many are added up before float64 takes over
    const Vec top = load(tops);
    for (int lane = 0; lane < kLanes; lane++) totals[lane] = 0;
    for (int64_t first = 0; first < panels; first += kTogether) {
      Vec found{};
      for (int64_t p = first; p < std::min(first + kTogether, panels); p++) {
        const int64_t place = p * stride + row;
        found += load(&sums[place]) * exp_negative(load(&heights[place]) - top);
      }
      for (int lane = 0; lane < kLanes; lane++) totals[lane] += found[lane];
    }
  }
};

// Where it goes only to be looked at, and weighed if there is somewhere to note that.
struct Seen {
  Tops* tops;
  Masses* masses;
};

// What a product is made of beside its size. `Extra` adds to the sums of a panel before
// they are stored: it is told of a panel by `begin` (column, width), and then asked for each of
// its blocks of rows by `add` (sums [rows, kWidth], row, rows).
template <typename Inputs, typename Extra>
struct Product {
  using Weight = typename Inputs::Weight;
  using Way = typename Inputs::Way;
  static constexpr int64_t kSums = Way::kSharing * Way::kRows * kWidth;
  const Inputs& inputs;
  const Projection& p;
  int64_t m;
  Extra extra[2];  // for a panel, or one of each half

  int64_t panels() const { return (p.n + kWidth - 1) / kWidth; }

  // Blocks of rows that a thread has the sums of at a time.
  struct Group {
    int64_t first, last;  // blocks
    int64_t row, rows;
  };

  // Whether so many blocks go through slices together.
  static bool shares(int64_t count) { return count > 1 && count <= Way::kSharing; }

  template <typename Act>
  void for_each_group(const Act& act) const {
    const typename Way::Blocks blocks(m, Way::kRows);
    const int64_t size = shares(blocks.count) ? blocks.count : 1;
    for (int64_t first = 0; first < blocks.count; first += size) {
      const int64_t row = blocks.first(first);
      act(Group{first, first + size, row, blocks.first(first + size) - row});
    }
  }

  // Sums of panel `number`; `panels` are multiplied group by group.
  void sum(int64_t number, int64_t panels, const Group& group, float* sums) const {
    const typename Way::Blocks blocks(m, Way::kRows);
    const int64_t depth = inputs.depth(), bytes = kWidth * sizeof(Weight), count = blocks.count;
    const int64_t size = shares(count) ? Way::kShared : Inputs::kSlice;
    const Weight* panel = packed(number);
    const auto* own = reinterpret_cast<const char*>(panel);
    const int64_t step = (bytes + count - 1) / count;
    for (int64_t i = 0; i < depth; i += size) {
      const int64_t slice = std::min(size, depth - i);
      for (int64_t b = group.first; b < group.last; b++) {
        const int64_t row = blocks.first(b), rows = blocks.first(b + 1) - row;
        // Read once, a panel runs ahead of itself. Of shared slices each block asks for a part of
        // the next, else for one of the panel behind those that are read together.
        const Ahead ahead =
            count == 1 ? Ahead{own + i * bytes + Way::kAhead * kLineBytes, bytes}
            : shares(count)
                ? Ahead{own + (i + size) * bytes + slice * bytes / count * b, step}
                : Ahead{own + panels * depth * bytes + depth * bytes / count * b + i * step, step};
        inputs.add(rows, row, i, panel + i * kWidth, slice, sums + (row - group.row) * kWidth,
                   ahead);
      }
    }
  }

  // Scale, bias, what a product is added to, and deltas, for a group of rows of a panel: in this
  // order, so that a row's deltas are the same to the bit whether they are added here or behind.
  template <typename To>
  void complete(float* sums, const Group& group, int64_t column, Extra& deltas,
                const To& to) const {
    const int64_t width = std::min<int64_t>(kWidth, p.n - column);
    if (width < kWidth)
      complete_last(sums, group.rows, column, width);
    else if (p.scale || p.bias)
      complete_whole(sums, group.rows, column);
    if constexpr (std::is_same_v<To, Plain>)
      if (to.residual) add_residual(to.residual + group.row * p.n + column, group.rows, width, sums);
    deltas.add(sums, group.row, group.rows);
  }

  // Not inlined: fused with the scale, numbers would be rounded otherwise than without deltas.
  __attribute__((noinline)) void add_residual(const float* residual, int64_t rows, int64_t width,
                                              float* sums) const {
    for (int64_t r = 0; r < rows; r++, residual += p.n, sums += kWidth) {
      int64_t c = 0;
      for (; c + kLanes <= width; c += kLanes) store(sums + c, load(sums + c) + load(residual + c));
      for (; c < width; c++) sums[c] += residual[c];
    }
  }

  void complete_whole(float* sums, int64_t rows, int64_t column) const {
    Vec scales[kPanelVecs], biases[kPanelVecs];
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) {
      scales[v] = p.scale ? load(p.scale + column + v * kLanes) : all(1.0f);
      biases[v] = p.bias ? load(p.bias + column + v * kLanes) : Vec{};
    }
    for (int64_t r = 0; r < rows; r++) {
      UNROLL
      for (int v = 0; v < kPanelVecs; v++) {
        float* place = sums + r * kWidth + v * kLanes;
        store(place, load(place) * scales[v] + biases[v]);
      }
    }
  }

  // The last panel may be narrower: what is behind its outputs is somebody else's.
  __attribute__((noinline)) void complete_last(float* sums, int64_t rows, int64_t column,
                                               int64_t width) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        float& value = sums[r * kWidth + c];
        if (p.scale) value *= p.scale[column + c];
        if (p.bias) value += p.bias[column + c];
      }
  }

  void put(const Plain& to, const float* sums, const Group& group, int64_t column) const {
    const int64_t n = p.n, width = std::min<int64_t>(kWidth, n - column);
    if (width < kWidth) return put_last(to, sums, group, column, width);
    const int64_t first = group.row * n + column;
    float* y = to.y + first;
    for (int64_t r = 0; r < group.rows; r++) {
      UNROLL
      for (int c = 0; c < kWidth; c += kLanes) store(y + r * n + c, load(sums + r * kWidth + c));
    }
  }

  __attribute__((noinline)) void put_last(const Plain& to, const float* sums, const Group& group,
                                          int64_t column, int64_t width) const {
    for (int64_t r = 0; r < group.rows; r++)
      for (int64_t c = 0; c < width; c++)
        to.y[(group.row + r) * p.n + column + c] = sums[r * kWidth + c];
  }

  void put(const Seen& to, float* sums, const Group& group, int64_t column) const {
    const int64_t width = std::min<int64_t>(kWidth, p.n - column);
    for (int64_t r = 0; r < group.rows; r++) {
      float* outputs = sums + r * kWidth;
      for (int64_t c = width; c < kWidth; c++) outputs[c] = -INFINITY;
      to.tops->look(group.row + r, outputs, column);
      if (to.masses) to.masses->weigh(group.row + r, outputs, column / kWidth);
    }
  }

  // The sums of both halves' panels, for outputs from `column` on.
  void put(const Gated& to, const float (&sums)[2][kSums], const Group& group,
           int64_t column) const {
    static_assert(kPanelVecs == 2);
    for (int64_t r = 0; r < group.rows; r++) {
      const auto activated = [&](int v) {
        const int64_t place = r * kWidth + v * kLanes;
        return silu(load(sums[0] + place)) * load(sums[1] + place);
      };
      to.put(group.row + r, p.n / 2, column, activated(0), activated(1));
    }
  }

  const Weight* packed(int64_t number) const {
    return static_cast<const Weight*>(p.packed) + number * inputs.depth() * kWidth;
  }

  void begin(int64_t number, int place) {
    const int64_t column = panel_column(number, p.n, p.halves);
    extra[place].begin(column, std::min<int64_t>(kWidth, p.n - column));
  }

  template <typename To>
  void multiply(int64_t number, const To& to) {
    const int64_t column = panel_column(number, p.n, p.halves);
    begin(number, 0);
    for_each_group([&](const Group& group) {
      alignas(64) float sums[kSums];  // begun by the first slice
      sum(number, 1, group, sums);
      complete(sums, group, column, extra[0], to);
      put(to, sums, group, column);
    });
  }

  // Panels `number` of both halves.
  void multiply(int64_t number, const Gated& to) {
    const int64_t column = number * kWidth, first = 2 * number, second = first + 1;
    begin(first, 0);
    begin(second, 1);
    for_each_group([&](const Group& group) {
      alignas(64) float sums[2][kSums];
      sum(first, 2, group, sums[0]);
      sum(second, 2, group, sums[1]);
      complete(sums[0], group, column, extra[0], to);
      complete(sums[1], group, p.n / 2 + column, extra[1], to);
      put(to, sums, group, column);
    });
  }

  // Called by a whole team of threads, each with a Product of its own.
  template <typename To>
  void share(const To& to) {
    constexpr bool kGated = std::is_same_v<To, Gated>;
    [[maybe_unused]] const typename Way::Scope scope;
#pragma omp for schedule(guided, 1) nowait
    for (int64_t j = 0; j < (kGated ? panels() / 2 : panels()); j++) multiply(j, to);
    meet();
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

// What `to` says, from x [rows, k], of which there are the `copies` of `share_copying`. Called by a
// whole team.
template <typename To, typename Extra>
void share_product(const float* x, const Projection& p, const To& to, const Batch& batch,
                   const Extra& extra, const InputCopies& copies) {
  const int64_t m = batch.rows;
  if (m == 0) return;
  const auto multiply = [&](const auto& inputs) {
    Product<std::decay_t<decltype(inputs)>, Extra>{inputs, p, m, {extra, extra}}.share(to);
  };
  if (p.format == kBytes) {
    const float* scales = copies.scales.data();
    if constexpr (kMatrixUnit)
      return multiply(ByteInputs{copies.bytes.data(), scales, p.plane(m), p.k});
    else
      return multiply(RoundedInputs{copies.values.data(), scales, p.k});
  }
  if (p.format == kAllBytes)
    return multiply(EightBitInputs{copies, p.k, batch});
  if (p.rounds_to_bfloat16(batch)) {
    using Inputs = std::conditional_t<kMatrixUnit, UnitInputs, BFloat16Inputs>;
    return multiply(Inputs{copies.values.data(), p.k});
  }
  int64_t ldx = p.k;
  if (p.spreads(batch)) x = copies.spread.data(), ldx = spread_stride(p.k);
  if (p.format == kFloats) return multiply(WholeInputs{x, p.k, ldx});
  multiply(WholeBFloat16Inputs{x, p.k, ldx});
}

}  // namespace dynamic_lora
