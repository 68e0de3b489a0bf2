// Short vectors of floats, as wide as the processor's, in the compiler's own notation.

#pragma once

#include <cstdint>

// GCC keeps an array in registers only if every loop over it is unrolled early.
#define UNROLL _Pragma("GCC unroll 16")

namespace dynamic_lora {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec all(float value) { return value - Vec{}; }

inline float sum(Vec v) {
  float total = 0;
  UNROLL
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

}  // namespace dynamic_lora
