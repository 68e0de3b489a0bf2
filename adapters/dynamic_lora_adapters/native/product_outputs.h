// Where products go: to memory as they are or activated, or to be looked at.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bfloat16.h"
#include "projection.h"
#include "room.h"
#include "vectors.h"

namespace dynamic_lora {

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

}  // namespace dynamic_lora
