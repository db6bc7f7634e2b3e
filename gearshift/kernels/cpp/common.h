// Numbers, vectors and small functions that the compiled kernels of a CPU share, and how a kernel
// is exported. Every kernel computes in float and rounds where its twin in tensor functions rounds
// (../reference.py, ../autograd.py), so that both give the same result; tests compare them.
//
// Letters: T packed tokens, M scored tokens, V vocabulary, H hidden, Q query heads, K key heads,
// R = Q / K, D head size (even), P positions of a block. In a matrix product out [M, N] =
// x [M, K] weight^T, M are rows, N outputs and K inputs. A block of the cache is [2, K, P * D]:
// keys as [D / 2, P, 2], values as [P / 2, D, 2], so that the pairs that a bf16 dot product adds at
// once lie together.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t P = BLOCK_SIZE;  // specs.py's BLOCK
static_assert(P == 16, "a block has as many positions as Lanes has numbers");

struct Half {  // bfloat16: the upper half of a float
  uint16_t bits;
};

inline float get(const float* p) { return *p; }
inline float get(const Half* p) { return std::bit_cast<float>(uint32_t(p->bits) << 16); }

inline void put(float* p, float x) { *p = x; }
inline void put(Half* p, float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t up = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : up);
}

// Sixteen floats at once; compilers map them to whatever registers the machine has.
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int32_t Index __attribute__((vector_size(64)));

inline Lanes get16(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Lanes get16(const Half* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return std::bit_cast<Lanes>(__builtin_convertvector(h, Bits) << 16);
}
inline void put16(float* p, Lanes x) { std::memcpy(p, &x, sizeof x); }
inline void put16(Half* p, Lanes x) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &half, sizeof half);
#else
  for (int i = 0; i < 16; ++i) put(p + i, x[i]);
#endif
}
inline Lanes every(float x) { return Lanes{} + x; }
inline Lanes fma16(Lanes a, Lanes b, Lanes c) {
#ifdef __AVX512F__
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

template <typename S>
inline float rounded(float x) {
  S s;
  put(&s, x);
  return get(&s);
}

// Two numbers of S for each of sixteen lanes, and sum + a.even * b.even + a.odd * b.odd.
template <typename S>
struct Pairs;
template <>
struct Pairs<float> {
  Lanes even, odd;
  static Pairs get(const float* p) {
    const Lanes low = get16(p), high = get16(p + 16);
#if __has_builtin(__builtin_shufflevector)
    return {__builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                    28, 30),
            __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27,
                                    29, 31)};
#else  // GCC before 12
    const Index even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, even + 1)};
#endif
  }
  static Pairs every(const float* p) { return {::every(p[0]), ::every(p[1])}; }
};
template <>
struct Pairs<Half> {
  Bits both;
  static Pairs get(const Half* p) {
    Pairs x;
    std::memcpy(&x.both, p, sizeof x.both);
    return x;
  }
  static Pairs every(const Half* p) {
    uint32_t two;
    std::memcpy(&two, p, sizeof two);
    return {Bits{} + two};
  }
};
inline Lanes dot(Lanes sum, const Pairs<float>& a, const Pairs<float>& b) {
  return fma16(a.even, b.even, fma16(a.odd, b.odd, sum));
}
inline Lanes dot(Lanes sum, const Pairs<Half>& a, const Pairs<Half>& b) {
#ifdef __AVX512BF16__
  return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.both, (__m512bh)b.both);
#else
  const auto even = [](Bits x) { return std::bit_cast<Lanes>(x << 16); };
  const auto odd = [](Bits x) { return std::bit_cast<Lanes>(x & 0xffff0000u); };
  return fma16(even(a.both), even(b.both), fma16(odd(a.both), odd(b.both), sum));
#endif
}

// exp to float accuracy, written so that compilers vectorise it: 2^n times a polynomial. It is 0
// where the result would not be a normal number.
inline float fast_exp(float exponent) {
  const float x = std::min(std::max(exponent, -87.0f), 88.0f);
  const float n = std::floor(x * 1.44269504088896341f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  y *= std::bit_cast<float>(int32_t(n + 127.0f) << 23);
  return exponent < -87.0f ? 0.0f : y;
}

// The probabilities of the scores from..to of a row of L; the rest becomes 0. The sum has PyTorch's
// order, too: lanes, then their halves. Returns the log of the sum of exponentials.
template <typename S>
inline float softmax(float* s, S* weights, int64_t from, int64_t to, int64_t L) {
  std::fill(s, s + from, -INFINITY);
  std::fill(s + to, s + L, -INFINITY);
  float top = s[from];
#pragma omp simd reduction(max : top)
  for (int64_t j = from; j < to; ++j) top = std::max(top, s[j]);
  Lanes total = {};
  for (int64_t j = 0; j < L; j += 16) {
#pragma omp simd
    for (int64_t i = j; i < j + 16; ++i) s[i] = fast_exp(s[i] - top);
    total += get16(s + j);
  }
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  const Lanes norm = every(1.0f / total[0]);
  for (int64_t j = 0; j < L; j += 16) put16(weights + j, get16(s + j) * norm);
  return top + std::log(total[0]);
}

#ifdef __AVX512BF16__
constexpr int64_t COLUMNS = 3, ROWS = 8;  // sums (of 16) that the registers hold beside operands

// Lays out 16 rows of a weight [N, K], K even, as [N / 16, K / 2, 16, 2], padded with zeros: one
// bf16 dot-product instruction takes 32 numbers for 16 outputs.
inline void prepack_strip(const Half* weight, Half* prepacked, int64_t N, int64_t K, int64_t n0) {
  const int64_t pairs = K / 2;
  for (int64_t k0 = 0; k0 < pairs; k0 += 16) {
    const int64_t some = std::min<int64_t>(16, pairs - k0);
    uint32_t square[16][16] = {};
    for (int64_t n = 0; n < std::min<int64_t>(16, N - n0); ++n)
      std::memcpy(square[n], weight + (n0 + n) * K + 2 * k0, size_t(some) * 4);
    Half* to = prepacked + (n0 / 16 * pairs + k0) * 32;
    for (int64_t k = 0; k < some; ++k) {
      uint32_t row[16];
      for (int64_t n = 0; n < 16; ++n) row[n] = square[n][k];
      std::memcpy(to + k * 32, row, sizeof row);
    }
  }
}
inline void prepack_rows(const Half* weight, Half* prepacked, int64_t N, int64_t K) {
  for (int64_t n0 = 0; n0 < N; n0 += 16) prepack_strip(weight, prepacked, N, K, n0);
}

// Sixteen outputs of a row, from the n-th on.
inline void put_outputs(Lanes y, const Half* bias, Half* row, int64_t N, int64_t n) {
  if (n + 16 <= N) {
    if (bias) y += get16(bias + n);
    put16(row + n, y);
  } else {
    for (int64_t i = 0; i < N - n; ++i) put(row + n + i, y[i] + (bias ? get(bias + n + i) : 0.0f));
  }
}

template <int64_t MB, int64_t NB>
inline void tile(const Half* x, int64_t K, const Half* prepacked, const Half* ahead,
                 const Half* bias, Half* out, int64_t N, int64_t n0) {
  const int64_t pairs = K / 2;
  __m512 sum[MB][NB], total[MB][NB];
  // Long sums are made of parts, as in oneDNN's products of the training gear, so that both round
  // alike.
  const int64_t part = K > 1024 ? 512 : 256;
  for (int64_t k0 = 0; k0 < pairs; k0 += part) {
#pragma GCC unroll 8
    for (int64_t m = 0; m < MB; ++m)
#pragma GCC unroll 3
      for (int64_t n = 0; n < NB; ++n) sum[m][n] = _mm512_setzero_ps();
    for (int64_t k = k0; k < std::min(pairs, k0 + part); ++k) {
      __builtin_prefetch(ahead + k * 32, 0, 2);
      __m512bh w[NB];
#pragma GCC unroll 3
      for (int64_t n = 0; n < NB; ++n)
        w[n] = (__m512bh)_mm512_loadu_si512(prepacked + (n * pairs + k) * 32);
#pragma GCC unroll 8
      for (int64_t m = 0; m < MB; ++m) {
        int32_t two;
        std::memcpy(&two, x + m * K + 2 * k, sizeof two);
        const __m512bh a = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 3
        for (int64_t n = 0; n < NB; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], a, w[n]);
      }
    }
#pragma GCC unroll 8
    for (int64_t m = 0; m < MB; ++m)
#pragma GCC unroll 3
      for (int64_t n = 0; n < NB; ++n)
        total[m][n] = k0 ? _mm512_add_ps(total[m][n], sum[m][n]) : sum[m][n];
  }
#pragma GCC unroll 8
  for (int64_t m = 0; m < MB; ++m)
#pragma GCC unroll 3
    for (int64_t n = 0; n < NB; ++n)
      put_outputs((Lanes)total[m][n], bias, out + m * N, N, n0 + 16 * n);
}
#endif  // __AVX512BF16__

// A whole team of threads runs a kernel, and shares its loops. A kernel is exported as a function
// of one array, which holds its arguments in slots of eight bytes (floats as doubles). So calls can
// be kept, and one team can make many of them again.
template <typename A>
A argument(int64_t slot) {
  if constexpr (std::is_pointer_v<A>) return reinterpret_cast<A>(slot);
  if constexpr (std::is_floating_point_v<A>) return A(std::bit_cast<double>(slot));
  if constexpr (std::is_integral_v<A>) return A(slot);
}
template <typename... A>
void call(void (*kernel)(A...), const int64_t* slots) {
  const auto run = [&]<size_t... I>(std::index_sequence<I...>) {
    kernel(argument<A>(slots[I])...);
  };
  if (omp_in_parallel()) return run(std::index_sequence_for<A...>{});
#pragma omp parallel
  run(std::index_sequence_for<A...>{});
}

template <typename A>
constexpr char letter() {  // as Python's `struct` names it
  return std::is_pointer_v<A> ? 'P' : std::is_floating_point_v<A> ? 'd' : 'q';
}

}  // namespace

struct Call {
  void (*kernel)(const int64_t*);
  const int64_t* slots;
};

// One line for each exported function: its name and the letters of its arguments. It is hidden,
// or two libraries in one process would share it.
__attribute__((visibility("hidden"))) inline std::string& exported() {
  static std::string lines;
  return lines;
}

namespace {
struct Exported {
  template <typename... A>
  Exported(const char* name, void (*)(A...)) {
    exported() += std::string(name) + ' ' + std::string{letter<A>()...} + '\n';
  }
};
}  // namespace

extern "C" {
// `build.py` compares them with the arguments that it gives.
__attribute__((used)) inline const char* signatures() { return exported().c_str(); }

// Makes recorded calls again, in their order.
__attribute__((used)) inline void replay(const Call* calls, int64_t count) {
#pragma omp parallel
  for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].slots);
}
}

#define EXPORT(NAME, SUFFIX, KERNEL)                                             \
  extern "C" void NAME##_##SUFFIX(const int64_t* slots) { call(KERNEL, slots); } \
  static const Exported NAME##_##SUFFIX##_exported(#NAME "_" #SUFFIX, KERNEL);
#define EXPORT_BOTH(NAME) EXPORT(NAME, float, NAME<float>) EXPORT(NAME, bf16, NAME<Half>)
