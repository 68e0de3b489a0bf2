// Numbers in float16 (IEEE 754 binary16), which are widened in registers.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace dynamic_lora {

struct Half {
  uint16_t bits;
};

// Exact, for every number that it can be.
inline float to_float(Half value) {
  // As a float's the exponent is 112 too low, and what is no number is one.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const bool finite = (value.bits & 0x7c00) != 0x7c00;
  const float scale = finite ? 0x1p112f : 1.0f;
  const uint32_t bits = finite ? magnitude : magnitude | 0x7f800000;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  wide *= scale;
  return value.bits & 0x8000 ? -wide : wide;
}

// kLanes neighbouring values, widened.
inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec wide;
  UNROLL
  for (int i = 0; i < kLanes; i++) wide[i] = to_float(p[i]);
  return wide;
#endif
}

}  // namespace dynamic_lora
