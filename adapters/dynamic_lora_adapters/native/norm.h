// Root-mean-square normalisation (Zhang & Sennrich 2019) in one pass over each row.

#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace dynamic_lora {

struct Norm {
  const float* weight;  // [dim]; null says that there is no such norm
  float eps, offset;    // offset is added to the weight
};

inline float sum_of_squares(const float* x, int64_t dim) {
  Vec squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    const Vec first = load(x + i), second = load(x + i + kLanes);
    squares[0] += first * first;
    squares[1] += second * second;
  }
  float total = sum(squares[0] + squares[1]);
  for (; i < dim; i++) total += x[i] * x[i];
  return total;
}

// to = from / sqrt(mean(from^2) + eps) * (weight + offset), [dim] each; they may be the same.
inline void normalise(const Norm& norm, const float* from, float* to, int64_t dim) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(from, dim) / dim + norm.eps);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes)
    store(to + i, load(from + i) * scale * (load(norm.weight + i) + norm.offset));
  for (; i < dim; i++) to[i] = from[i] * scale * (norm.weight[i] + norm.offset);
}

}  // namespace dynamic_lora
