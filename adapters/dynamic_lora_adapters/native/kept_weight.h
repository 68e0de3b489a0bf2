// Weights as a model keeps them: in one or more tensors, in float32 or in sixteen bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "half.h"
#include "vectors.h"

namespace dynamic_lora {

// Rows of a weight that lie in one tensor.
struct KeptRows {
  enum Format : int64_t { kFloats, kBFloat16, kHalf };

  const void* data;
  int64_t stride;  // from one row to the next, in numbers
  int64_t rows;
  int64_t format;

  template <typename Number>
  const Number* row(int64_t number) const {
    return static_cast<const Number*>(data) + number * stride;
  }
};

// Some inputs of neighbouring rows, with `stride` floats from one row to the next.
struct WeightBlock {
  const float* data;
  int64_t stride;
};

// A weight [n, k] whose rows are those of its parts, one part after the other.
struct KeptWeight {
  const KeptRows* parts;
  int64_t n, k;

  // Inputs [first, first + count) of rows [row, row + rows): where they lie, or copied, widened, to
  // `room` [rows, stride].
  WeightBlock block(int64_t row, int64_t rows, int64_t first, int64_t count, float* room,
                    int64_t stride) const {
    const KeptRows* part = parts;
    for (; row >= part->rows; part++) row -= part->rows;
    if (part->format == KeptRows::kFloats && row + rows <= part->rows)
      return {part->row<float>(row) + first, part->stride};
    for (int64_t i = 0; i < rows; i++, row++) {
      for (; row >= part->rows; part++) row -= part->rows;
      copy(*part, row, first, count, room + i * stride);
    }
    return {room, stride};
  }

 private:
  static void copy(const KeptRows& part, int64_t row, int64_t first, int64_t count, float* to) {
    if (part.format == KeptRows::kBFloat16)
      widen(part.row<BFloat16>(row) + first, count, to);
    else if (part.format == KeptRows::kHalf)
      widen(part.row<Half>(row) + first, count, to);
    else
      std::memcpy(to, part.row<float>(row) + first, count * sizeof(float));
  }

  template <typename Number>
  static void widen(const Number* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = to_float(from[i]);
  }
};

}  // namespace dynamic_lora
