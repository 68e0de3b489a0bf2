// Root-mean-square normalisation (Zhang & Sennrich 2019) in one pass over each row.

#include <cmath>
#include <cstdint>

#include "vectors.h"

using namespace dynamic_lora;

namespace {

constexpr int64_t kRowsWorthSharing = 64;  // waking the other threads takes longer for fewer

float sum_of_squares(const float* x, int64_t dim) {
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

}  // namespace

// out = x / sqrt(mean(x^2) + eps) * (weight + offset); x and out [rows, dim], weight [dim].
extern "C" void dynamic_lora_rms_norm(const float* x, const float* weight, float* out, int64_t rows,
                                      int64_t dim, float eps, float offset) {
#pragma omp parallel for schedule(static) if (rows >= kRowsWorthSharing)
  for (int64_t row = 0; row < rows; row++) {
    const float* from = x + row * dim;
    float* to = out + row * dim;
    const float scale = 1.0f / std::sqrt(sum_of_squares(from, dim) / dim + eps);
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes)
      store(to + i, load(from + i) * scale * (load(weight + i) + offset));
    for (; i < dim; i++) to[i] = from[i] * scale * (weight[i] + offset);
  }
}
