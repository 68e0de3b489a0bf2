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
#include <cstdint>
#include <type_traits>

#include "product_inputs.h"
#include "product_outputs.h"
#include "projection.h"
#include "team.h"
#include "vectors.h"

namespace dynamic_lora {

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
  static constexpr int64_t kSums = Way::kSharing * Way::kRows * kWidth;
  static constexpr int64_t kRowBytes = kWidth * sizeof(Weight);  // of a panel
  const Inputs& inputs;
  const Projection& p;
  int64_t m;
  Extra extra[2];  // for a panel, or one of each half
  // Reckoned once: divisions take a part of the time of a tile.
  const typename Way::Blocks blocks{m, Way::kRows};
  const int64_t part = inputs.depth() * kRowBytes / blocks.count;  // of a panel, for each block
  const int64_t step = (kRowBytes + blocks.count - 1) / blocks.count;

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
    const int64_t size = shares(blocks.count) ? blocks.count : 1;
    for (int64_t first = 0; first < blocks.count; first += size) {
      const int64_t row = blocks.first(first);
      act(Group{first, first + size, row, blocks.first(first + size) - row});
    }
  }

  // Sums of panel `number`; `panels` are multiplied group by group.
  void sum(int64_t number, int64_t panels, const Group& group, float* sums) const {
    const int64_t depth = inputs.depth(), count = blocks.count;
    const int64_t size = shares(count) ? Way::kShared : Inputs::kSlice;
    const Weight* panel = packed(number);
    const auto* own = reinterpret_cast<const char*>(panel);
    for (int64_t i = 0; i < depth; i += size) {
      const int64_t slice = std::min(size, depth - i);
      for (int64_t b = group.first; b < group.last; b++) {
        const int64_t row = blocks.first(b), rows = blocks.first(b + 1) - row;
        // Read once, a panel runs ahead of itself. Of shared slices each block asks for a part of
        // the next, else for one of the panel behind those that are read together.
        const Ahead ahead =
            count == 1 ? Ahead{own + i * kRowBytes + Way::kAhead * kLineBytes, kRowBytes}
            : shares(count)
                ? Ahead{own + (i + size) * kRowBytes + slice * kRowBytes / count * b, step}
                : Ahead{own + panels * depth * kRowBytes + part * b + i * step, step};
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
