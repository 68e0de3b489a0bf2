// Short vectors of floats, as wide as the processor's, in the compiler's own notation.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// GCC keeps an array in registers only if every loop over it is unrolled early.
#define UNROLL _Pragma("GCC unroll 16")

namespace dynamic_lora {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

constexpr int64_t kLineBytes = 64;  // of a cache line

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }

inline void store_each(float* p, Vec v) { store(p, v); }
inline void store_each(float* p, Vec one, Vec other) {
  store(p, one);
  store(p + kLanes, other);
}

inline Vec all(float value) { return value - Vec{}; }

// one * other + more, rounded once where the processor can. The compiler may do that too, or not,
// and would not for all numbers of rows that a loop is written for.
inline Vec fused(Vec one, Vec other, Vec more) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(reinterpret_cast<__m512>(one),
                                               reinterpret_cast<__m512>(other),
                                               reinterpret_cast<__m512>(more)));
#elif defined(__AVX2__) && defined(__FMA__)
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(reinterpret_cast<__m256>(one),
                                               reinterpret_cast<__m256>(other),
                                               reinterpret_cast<__m256>(more)));
#else
  return one * other + more;
#endif
}

// Whether a comparison holds in some lane.
inline bool any(IntVec holds) {
#if defined(__AVX512F__)
  const auto lanes = reinterpret_cast<__m512i&>(holds);
  return _mm512_test_epi32_mask(lanes, lanes) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256&>(holds)) != 0;
#else
  bool found = false;
  UNROLL
  for (int i = 0; i < kLanes; i++) found |= holds[i] != 0;
  return found;
#endif
}

// Where a loop has got to in the memory that is read next.
struct Ahead {
  const char* line;
  int64_t step;  // bytes that each iteration goes on by, two lines at most

  // With one of two lines asked for, the processor's own reading ahead loses the thread, and a
  // stream comes at two thirds of the speed.
  void ask() {
    __builtin_prefetch(line);
    if (step > kLineBytes) __builtin_prefetch(line + kLineBytes);
    line += step;
  }

  // The same, and what is `further` bytes away into the second-level cache: more lines are on their
  // way so than the first-level one may wait for.
  void ask_twice(int64_t further) {
    __builtin_prefetch(line + further, 0, 2);
    ask();
  }

  // Whether each iteration has a line to ask for.
  bool often() const { return step >= kLineBytes; }

  // For so many iterations at a time, into the second-level cache: of a short step not every
  // iteration needs a line, and each that is asked for costs it something.
  void ask_further(int64_t iterations) {
    for (int64_t place = 0; place < iterations * step; place += kLineBytes)
      __builtin_prefetch(line + place, 0, 2);
    line += iterations * step;
  }
};

// The value in a register: GCC would rather read it from memory again for each use.
template <typename Any>
inline Any held(Any v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

template <typename Any>
inline Any* held(Any* p) {
  asm("" : "+r"(p));
  return p;
}

// The rows of a tile, a stride apart, by a pointer to every third of them: as many as there are rows
// do not fit the registers, and an address may have the stride or twice it added.
template <int Rows, typename Element>
class TileRows {
 public:
  TileRows(const Element* first, int64_t stride) : stride_(stride) {
    UNROLL
    for (int i = 0; i < kPointers; i++) thirds_[i] = first + 3 * i * stride;
  }

  const Element* at(int row) const { return thirds_[row / 3] + row % 3 * stride_; }

  void go_on(int64_t elements) {
    UNROLL
    for (int i = 0; i < kPointers; i++) thirds_[i] = held(thirds_[i] + elements);
  }

 private:
  static constexpr int kPointers = (Rows + 2) / 3;
  const Element* thirds_[kPointers];
  int64_t stride_;
};

constexpr int kStepsTogether = 4;  // steps of a tile's loop that follow each other without a test

// Calls `step` with 0, 1, 2 and so on, up to kStepsTogether - 1, and `go_on` behind them with their number,
// until there were `count` steps.
template <typename Step, typename GoOn>
inline __attribute__((always_inline)) void step_together(int64_t count, const Step& step,
                                                         const GoOn& go_on) {
  for (; count >= kStepsTogether; count -= kStepsTogether) {
    UNROLL
    for (int n = 0; n < kStepsTogether; n++) step(n);
    go_on(kStepsTogether);
  }
  for (; count > 0; count--) {
    step(0);
    go_on(1);
  }
}

// Sums of a tile that go on from those in y [Rows, ldy], or, where that is `fresh`, from nothing.
template <int Rows, int Vecs>
inline void begin_sums(bool fresh, const float* y, int64_t ldy, Vec (&sums)[Rows][Vecs]) {
  if (fresh) {
    UNROLL
    for (int r = 0; r < Rows; r++) {
      UNROLL
      for (int v = 0; v < Vecs; v++) sums[r][v] = Vec{};
    }
  } else {
    UNROLL
    for (int r = 0; r < Rows; r++) {
      UNROLL
      for (int v = 0; v < Vecs; v++) sums[r][v] = load(y + r * ldy + v * kLanes);
    }
  }
}

// Stores the sums of a tile to y [Rows, ldy].
template <int Rows, int Vecs>
inline void end_sums(const Vec (&sums)[Rows][Vecs], float* y, int64_t ldy) {
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) store(y + r * ldy + v * kLanes, sums[r][v]);
  }
}

// Spelt out for x86, where GCC adds the lanes one by one.
inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512&>(v));
#elif defined(__AVX2__)
  const __m256 whole = reinterpret_cast<__m256&>(v);
  __m128 part = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  part = _mm_add_ps(part, _mm_movehl_ps(part, part));
  return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
#else
  float total = 0;
  UNROLL
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
#endif
}

// The highest of all lanes, none of which is NaN.
inline float highest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512&>(v));
#elif defined(__AVX2__)
  const __m256 whole = reinterpret_cast<__m256&>(v);
  __m128 part = _mm_max_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  part = _mm_max_ps(part, _mm_movehl_ps(part, part));
  return _mm_cvtss_f32(_mm_max_ss(part, _mm_movehdup_ps(part)));
#else
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// The sum of all lanes.
inline int32_t sum(IntVec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i&>(v));
#else
  int32_t total = 0;
  UNROLL
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
#endif
}

// The sums of four vectors, times `factor`, to `out`.
inline void sum_each(const Vec (&v)[4], float factor, float* out) {
#if defined(__AVX512F__)
  // Their quarters are added side by side, then neighbours within the four that are left.
  const auto part = [&v](int i) { return _mm512_loadu_ps(reinterpret_cast<const float*>(v + i)); };
  const auto fold = [](__m512 one, __m512 other) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88),
                         _mm512_shuffle_f32x4(one, other, 0xdd));
  };
  const __m512 fours = fold(fold(part(0), part(1)), fold(part(2), part(3)));
  const __m512 twos = _mm512_add_ps(fours, _mm512_permute_ps(fours, 0x4e));
  const __m512 ones = _mm512_add_ps(twos, _mm512_permute_ps(twos, 0xb1));
  const __m512i firsts = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  const __m128 sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, ones));
  _mm_storeu_ps(out, _mm_mul_ps(sums, _mm_set1_ps(factor)));
#elif defined(__AVX2__)
  const auto part = [&v](int i) { return _mm256_loadu_ps(reinterpret_cast<const float*>(v + i)); };
  const __m256 pairs =
      _mm256_hadd_ps(_mm256_hadd_ps(part(0), part(1)), _mm256_hadd_ps(part(2), part(3)));
  const __m128 whole = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, _mm_mul_ps(whole, _mm_set1_ps(factor)));
#else
  UNROLL
  for (int i = 0; i < 4; i++) out[i] = sum(v[i]) * factor;
#endif
}

// e^x for x <= 0, by splitting off powers of two and a polynomial of degree 6
// on [-ln2/2, ln2/2]; the relative error is below 3e-7. Below -87 it is 0.
inline Vec exp_negative(Vec x) {
  const Vec low = all(-87.0f);
  const Vec clipped = x < low ? low : x;
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec power = (clipped * 1.44269504f + magic) - magic;
  const Vec rest = (clipped - power * 0.693359375f) + power * 2.12194440e-4f;
  Vec p = all(1.0f / 720);
  p = p * rest + 1.0f / 120;
  p = p * rest + 1.0f / 24;
  p = p * rest + 1.0f / 6;
  p = p * rest + 0.5f;
  p = p * rest + 1.0f;
  p = p * rest + 1.0f;
  const IntVec exponent = (__builtin_convertvector(power, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return x < low ? Vec{} : p * scale;
}

// x * sigmoid(x), from e^-|x| so that nothing overflows.
inline Vec silu(Vec x) {
  const Vec small = exp_negative(x < Vec{} ? x : -x);
  return x * (x < Vec{} ? small : all(1.0f)) / (1.0f + small);
}

}  // namespace dynamic_lora
