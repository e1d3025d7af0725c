// Sixteen floats or sixty-four bytes at a time, three ways: AVX-512, AVX2 with FMA, or plain loops that any C++ compiler can
// vectorise.
// Every operation rounds lane by lane alike on all three; only sums over lanes may be added in another order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace simd {

constexpr int64_t kLanes = 16;

struct Bf16 {  // a float's upper half
  uint16_t bits;
};
struct E4m3 {  // float8: sign, 4 bits of exponent, 3 of fraction; no infinities
  uint8_t bits;
};

inline float widen(float value) { return value; }
inline float widen(int8_t value) { return static_cast<float>(value); }
inline float widen(uint8_t value) { return static_cast<float>(value); }
inline float widen(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float widen(E4m3 value) {  // a float of the same bits has an exponent 120 smaller
  const uint32_t bits = static_cast<uint32_t>(value.bits & 0x80u) << 24 | static_cast<uint32_t>(value.bits & 0x7fu) << 20;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide * 0x1p120f;
}

inline Bf16 narrow(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

#if defined(__AVX512BW__)

constexpr int kAccumulators = 16;  // sums kept in registers at once, beside what is multiplied

struct Floats {
  __m512 v;
};
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const Bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Floats load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Floats load(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Floats load(const E4m3* p) {  // by way of float16, whose exponent is 8 larger for the same bits
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
  const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)), 7));
  return {_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f))};
}
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats clamp(Floats a, float low, float high) {
  return {_mm512_min_ps(_mm512_max_ps(a.v, _mm512_set1_ps(low)), _mm512_set1_ps(high))};
}
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats times_power_of_two(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline void sums4(const Floats* a, float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(abcd), upper);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
}

// The sixteen values of a 4-bit weight with zero point 8 and this scale.
struct Nibbles {
  __m512 values;
  explicit Nibbles(Bf16 scale) {
    const __m512i wide = _mm512_slli_epi32(_mm512_set1_epi16(static_cast<short>(scale.bits)), 16);
    const __m512 steps = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    values = _mm512_mul_ps(steps, _mm512_castsi512_ps(wide));
  }
  // 16 bytes → the low nibbles' values and the high nibbles'. The permutation reads the lowest four bits of each index.
  void expand(const uint8_t* p, Floats& low, Floats& high) const {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low.v = _mm512_permutexvar_ps(bytes, values);
    high.v = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values);
  }
};

// Wait for loads under way: where the arithmetic is so short that hundreds of loads run ahead, they fill the queue which the
// fetches of what comes later need (measured: 20 GB/s without, 30 with).
inline void wait_for_loads() { _mm_lfence(); }

struct Bytes {
  __m512i v;
};
struct Ints {
  __m512i v;
};
inline Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes load_bytes(const void* p, int64_t count) {
  return {_mm512_maskz_loadu_epi8(count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1, p)};
}
inline Bytes splat4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return {_mm512_set1_epi32(four)};
}
inline Ints ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Floats floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Floats quarters(uint64_t four) {
  const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(four))), 16);
  const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi32(places, _mm512_castsi128_si512(wide)))};
}
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
inline __m512i add_fours(__m512i sums, __m512i unsigned_, __m512i signed_) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sums, unsigned_, signed_);
#else  // in 16 bits, two halves of the unsigned numbers apart, so that nothing saturates
  const __m512i low = _mm512_and_si512(unsigned_, _mm512_set1_epi8(15)), ones = _mm512_set1_epi16(1);
  const __m512i high = _mm512_and_si512(_mm512_srli_epi16(unsigned_, 4), _mm512_set1_epi8(15));
  sums = _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(low, signed_), ones));
  return _mm512_add_epi32(sums, _mm512_slli_epi32(_mm512_madd_epi16(_mm512_maddubs_epi16(high, signed_), ones), 4));
#endif
}
constexpr int32_t kOffset = 128;  // this instruction wants weights without sign
inline Ints dot_signed(Bytes weights, Bytes x, Ints sums) {
  return {add_fours(sums.v, _mm512_xor_si512(weights.v, _mm512_set1_epi8(-128)), x.v)};
}
inline Ints dot_unsigned(Bytes weights, Bytes x, Ints sums) { return {add_fours(sums.v, weights.v, x.v)}; }
inline void sums4(const Ints* a, int32_t* out) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0].v, a[1].v), _mm512_unpackhi_epi32(a[0].v, a[1].v));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2].v, a[3].v), _mm512_unpackhi_epi32(a[2].v, a[3].v));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), four);
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kAccumulators = 8;

struct Floats {
  __m256 a, b;
};
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen8(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Floats load(const Bf16* p) { return {widen8(p), widen8(p + 8)}; }
inline Floats load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Floats load(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline __m256 widen8(__m128i bytes) {  // the lowest 8 of 16
  const __m256i wide = _mm256_cvtepu8_epi32(bytes);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x80)), 24);
  const __m256i rest = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x7f)), 20);
  return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, rest)), _mm256_set1_ps(0x1p120f));
}
inline Floats load(const E4m3* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {widen8(bytes), widen8(_mm_srli_si128(bytes, 8))};
}
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats clamp(Floats x, float low, float high) {
  const __m256 bottom = _mm256_set1_ps(low), top = _mm256_set1_ps(high);
  return {_mm256_min_ps(_mm256_max_ps(x.a, bottom), top), _mm256_min_ps(_mm256_max_ps(x.b, bottom), top)};
}
inline Floats round(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
inline __m256 power_of_two(__m256 n) {  // n from −126 to 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Floats times_power_of_two(Floats x, Floats n) {
  return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
inline void sums4(const Floats* x, float* out) {
  __m256 eight[4];
  for (int i = 0; i < 4; ++i) eight[i] = _mm256_add_ps(x[i].a, x[i].b);
  const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]), _mm256_hadd_ps(eight[2], eight[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
}

struct Nibbles {
  __m256 scale;
  explicit Nibbles(Bf16 scale_) : scale(_mm256_set1_ps(widen(scale_))) {}
  Floats widened(__m128i nibbles) const {
    const __m128i steps = _mm_sub_epi8(nibbles, _mm_set1_epi8(8));
    return {_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(steps)), scale),
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(steps, 8))), scale)};
  }
  void expand(const uint8_t* p, Floats& low, Floats& high) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
    low = widened(_mm_and_si128(bytes, mask));
    high = widened(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  }
};

inline void wait_for_loads() {}

struct Bytes {
  __m256i a, b;
};
struct Ints {
  __m256i a, b;
};
inline Bytes load_bytes(const void* p) {
  const __m256i* from = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline Bytes load_bytes(const void* p, int64_t count) {
  if (count >= 64) return load_bytes(p);
  alignas(64) uint8_t bytes[64] = {};
  std::memcpy(bytes, p, static_cast<size_t>(count));
  return load_bytes(bytes);
}
inline Bytes splat4(const void* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}
inline Ints ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Floats quarters(uint64_t four) {
  const __m128i wide = _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(four))), 16);
  const __m256 numbers = _mm256_castsi256_ps(_mm256_broadcastsi128_si256(wide));
  return {_mm256_permutevar8x32_ps(numbers, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
          _mm256_permutevar8x32_ps(numbers, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
}
inline Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Bytes high_nibbles(Bytes x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
inline __m256i add_fours(__m256i sums, __m256i unsigned_, __m256i signed_) {  // pairs stay below 2^15: no saturation
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_, signed_), _mm256_set1_epi16(1)));
}
constexpr int32_t kOffset = 0;
inline Ints dot_signed(Bytes weights, Bytes x, Ints sums) {  // |weight| · x with the weight's sign
  return {add_fours(sums.a, _mm256_abs_epi8(weights.a), _mm256_sign_epi8(x.a, weights.a)),
          add_fours(sums.b, _mm256_abs_epi8(weights.b), _mm256_sign_epi8(x.b, weights.b))};
}
inline Ints dot_unsigned(Bytes weights, Bytes x, Ints sums) {
  return {add_fours(sums.a, weights.a, x.a), add_fours(sums.b, weights.b, x.b)};
}
inline void sums4(const Ints* x, int32_t* out) {
  __m256i eight[4];
  for (int i = 0; i < 4; ++i) eight[i] = _mm256_add_epi32(x[i].a, x[i].b);
  const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(eight[0], eight[1]), _mm256_hadd_epi32(eight[2], eight[3]));
  const __m128i done = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), done);
}

#else

constexpr int kAccumulators = 8;

struct Floats {
  float v[kLanes];
};
template <class F>
inline Floats each(F f) {
  Floats out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}
inline Floats splat(float x) {
  return each([&](int) { return x; });
}
template <class T>
inline Floats load(const T* p) {
  return each([&](int i) { return widen(p[i]); });
}
inline void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline Floats operator+(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats operator-(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats operator*(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(Floats a, Floats b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats fma(Floats a, Floats b, Floats c) {  // two roundings where the machine has no fused operation
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Floats clamp(Floats a, float low, float high) {
  return each([&](int i) { return std::min(std::max(a.v[i], low), high); });
}
inline Floats round(Floats a) {
  return each([&](int i) { return std::nearbyint(a.v[i]); });
}
inline Floats times_power_of_two(Floats a, Floats n) {
  return each([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
}
inline void sums4(const Floats* a, float* out) {
  for (int i = 0; i < 4; ++i) {
    Floats x = a[i];
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int lane = 0; lane < width; ++lane) x.v[lane] += x.v[lane + width];
    out[i] = x.v[0];
  }
}

struct Nibbles {
  float scale;
  explicit Nibbles(Bf16 scale_) : scale(widen(scale_)) {}
  void expand(const uint8_t* p, Floats& low, Floats& high) const {
    low = each([&](int i) { return static_cast<float>((p[i] & 15) - 8) * scale; });
    high = each([&](int i) { return static_cast<float>((p[i] >> 4) - 8) * scale; });
  }
};

inline void wait_for_loads() {}

struct Bytes {
  uint8_t v[4 * kLanes];
};
struct Ints {
  int32_t v[kLanes];
};
inline Bytes load_bytes(const void* p, int64_t count = 4 * kLanes) {
  Bytes out = {};
  std::memcpy(out.v, p, static_cast<size_t>(std::min(count, 4 * kLanes)));
  return out;
}
inline Bytes splat4(const void* p) {
  Bytes out;
  for (int i = 0; i < 4 * kLanes; i += 4) std::memcpy(out.v + i, p, 4);
  return out;
}
inline Ints ints(int32_t x) {
  Ints out;
  std::fill(out.v, out.v + kLanes, x);
  return out;
}
inline Floats floats(Ints a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
inline Floats quarters(uint64_t four) {
  return each([&](int i) { return widen(Bf16{static_cast<uint16_t>(four >> (i / 4 * 16))}); });
}
inline Bytes low_nibbles(Bytes a) {
  for (uint8_t& byte : a.v) byte &= 15;
  return a;
}
inline Bytes high_nibbles(Bytes a) {
  for (uint8_t& byte : a.v) byte >>= 4;
  return a;
}
constexpr int32_t kOffset = 0;
inline Ints dot_signed(Bytes weights, Bytes x, Ints sums) {
  for (int i = 0; i < 4 * kLanes; ++i) sums.v[i / 4] += static_cast<int8_t>(weights.v[i]) * static_cast<int8_t>(x.v[i]);
  return sums;
}
inline Ints dot_unsigned(Bytes weights, Bytes x, Ints sums) {
  for (int i = 0; i < 4 * kLanes; ++i) sums.v[i / 4] += weights.v[i] * static_cast<int8_t>(x.v[i]);
  return sums;
}
inline void sums4(const Ints* a, int32_t* out) {
  for (int i = 0; i < 4; ++i) {
    out[i] = 0;
    for (int lane = 0; lane < kLanes; ++lane) out[i] += a[i].v[lane];
  }
}

#endif

// Integers: `dot_signed` and `dot_unsigned` add to each of sixteen sums the products of four neighbouring weights (int8, or
// uint8 below 16) with four x (int8, never −128); `dot_signed` adds kOffset · Σ x too much. `quarters`: four bfloat16
// numbers, each in four lanes. `load_bytes` of fewer than 64 has zeros behind them.

// The sums over lanes of `n` vectors, each added in the same order wherever it stands.
template <int n, class Vector, class Number>
inline void sums(const Vector* a, Number* out) {
  for (int i = 0; i + 4 <= n; i += 4) sums4(a + i, out + i);
  constexpr int left = n % 4;
  if constexpr (left > 0) {
    Vector padded[4] = {};
    Number four[4];
    for (int i = 0; i < left; ++i) padded[i] = a[n - left + i];
    sums4(padded, four);
    for (int i = 0; i < left; ++i) out[n - left + i] = four[i];
  }
}
inline float sum(Floats a) {
  float out;
  sums<1>(&a, &out);
  return out;
}

// e^x to about one unit in the last place, from 1e-38 to 3e38; beyond, the bound. Coefficients: Cephes' expf (Moshier).
inline Floats exp(Floats x) {
  x = clamp(x, -87.3f, 88.3f);
  const Floats n = round(x * splat(1.44269504088896341f));
  const Floats r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));  // ln 2 in two parts
  Floats p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, splat(c));
  return times_power_of_two(fma(p, r * r, r + splat(1.0f)), n);
}

}  // namespace simd
