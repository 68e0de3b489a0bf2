// Passes over one row of logits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace dynamic_lora {

constexpr int64_t kBlock = 64 * kLanes;  // so many are added up in float32 before float64 takes over

// As many values as a vector has, from `at` on; -inf past the row's end.
inline Vec part(const float* row, int64_t at, int64_t width) {
  if (at + kLanes <= width) return load(row + at);
  Vec found = all(-INFINITY);
  for (int64_t i = at; i < width; i++) found[i - at] = row[i];
  return found;
}

// The largest number of a row; values that are no numbers are passed over.
inline float highest_of(const float* row, int64_t width) {
  Vec top = all(-INFINITY);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec next = part(row, i, width);
    top = next > top ? next : top;
  }
  float found = top[0];
  for (int lane = 1; lane < kLanes; lane++) found = std::max(found, top[lane]);
  return found;
}

// The sum of e^(x - top), each of which `each` is told of (vector, place); no number if one of
// them is none, or if there is no finite top.
template <typename Each>
double mass(const float* row, int64_t width, float top, Each each) {
  double total = 0;
  for (int64_t start = 0; start < width; start += kBlock) {
    Vec sums{};
    const int64_t stop = std::min(start + kBlock, width);
    for (int64_t i = start; i < stop; i += kLanes) {
      const Vec weights = exp_negative(part(row, i, width) - top);
      each(weights, i);
      sums += weights;
    }
    total += sum(sums);
  }
  return total;
}

}  // namespace dynamic_lora
