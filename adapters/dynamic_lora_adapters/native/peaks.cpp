// What greedy decoding needs of a row of logits: where it is highest, and what divides it.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vectors.h"

using namespace dynamic_lora;

namespace {

constexpr int64_t kBlock = 64 * kLanes;  // so many are added up in float32 before float64 takes over

// As many values as a vector has, from `at` on; -inf past the row's end.
inline Vec part(const float* row, int64_t at, int64_t width) {
  if (at + kLanes <= width) return load(row + at);
  Vec found = all(-INFINITY);
  for (int64_t i = at; i < width; i++) found[i - at] = row[i];
  return found;
}

// The largest number of a row; values that are no numbers are passed over.
float highest(const float* row, int64_t width) {
  Vec top = all(-INFINITY);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec next = part(row, i, width);
    top = next > top ? next : top;
  }
  float found = top[0];
  for (int lane = 1; lane < kLanes; lane++) found = std::max(found, top[lane]);
  return found;
}

// The logarithm of the sum of e^(x - top); no number if one of them is none, or none is finite.
float log_mass(const float* row, int64_t width, float top) {
  double total = 0;
  for (int64_t start = 0; start < width; start += kBlock) {
    Vec sums{};
    const int64_t stop = std::min(start + kBlock, width);
    for (int64_t i = start; i < stop; i += kLanes) sums += exp_negative(part(row, i, width) - top);
    total += sum(sums);
  }
  return static_cast<float>(std::log(total));
}

}  // namespace

// logits [rows, width]; the others [rows]. The first of equal ones is the highest.
extern "C" void dynamic_lora_peaks(const float* logits, int64_t rows, int64_t width, int64_t* index,
                                   float* heights, float* log_masses) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* row = logits + r * width;
    heights[r] = highest(row, width);
    index[r] = std::find(row, row + width, heights[r]) - row;
    if (index[r] == width) index[r] = 0;  // a row of nothing but NaN
    log_masses[r] = log_mass(row, width, heights[r]);
  }
}
