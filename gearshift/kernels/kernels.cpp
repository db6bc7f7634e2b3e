// Small operations of both gears on a CPU, where a chain of tensor operations would spend
// its time on passes over memory and on dispatch. Compiled at first use (see native.py); every
// function has a slow twin in tensors (engine/kernels.py, models/logprobs.py), which tests hold it to. Numbers are computed in float and
// rounded where the twin rounds, so that both give the same model.
//
// Legend: T tokens of one forward, H query heads, K key heads, R = H / K, D head size (even), P
// positions in a block. A block of the cache is [2, K, P * D]: keys as [D / 2, P, 2], values as
// [P / 2, D, 2], so that the pairs that a bf16 dot product adds at once lie together.

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t P = 16;  // cache.py's BLOCK

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
    const Index e = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return {__builtin_shuffle(low, high, e), __builtin_shuffle(low, high, e + 1)};
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

// exp to float accuracy, written so that compilers vectorise it: 2^n times a polynomial; 0 where the
// result would not be a normal number.
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

// The sum of term(0) ... term(C-1) in the order in which PyTorch's CPU reduction adds (four
// accumulators of eight lanes): the generation gear's norms are then the training gear's to the bit,
// where in bf16 one rounding that falls otherwise moves a log-prob by hundredths of a nat.
template <typename Term>
inline float ordered_sum(int64_t C, Term term) {
  constexpr int64_t LANES = 8, ROWS = 4, STEP = 16, LEVELS = 4;
  const int64_t vectors = C / LANES, size = vectors / ROWS;
  float level[LEVELS][ROWS * LANES] = {};
  int64_t i = 0;
  const auto add = [&](int64_t from) {
    for (int64_t l = 0; l < ROWS * LANES; ++l) level[0][l] += term(from * ROWS * LANES + l);
  };
  while (i + STEP <= size) {
    for (int64_t j = 0; j < STEP; ++j, ++i) add(i);
    for (int64_t j = 1; j < LEVELS; ++j) {
      for (int64_t l = 0; l < ROWS * LANES; ++l) {
        level[j][l] += level[j - 1][l];
        level[j - 1][l] = 0;
      }
      if (i & ((STEP - 1) << (4 * j))) break;
    }
  }
  for (; i < size; ++i) add(i);
  for (int64_t j = 1; j < LEVELS; ++j)
    for (int64_t l = 0; l < ROWS * LANES; ++l) level[0][l] += level[j][l];
  for (int64_t v = size * ROWS; v < vectors; ++v)
    for (int64_t l = 0; l < LANES; ++l) level[0][l] += term(v * LANES + l);
  for (int64_t r = 1; r < ROWS; ++r)
    for (int64_t l = 0; l < LANES; ++l) level[0][l] += level[0][r * LANES + l];
  float sum = 0;
  for (int64_t c = vectors * LANES; c < C; ++c) sum += term(c);
  for (int64_t l = 0; l < LANES; ++l) sum += level[0][l];
  return sum;
}

template <typename S>
void add_norm(const S* x, const S* delta, const S* weight, const S* bias, S* sum, S* out, int64_t T,
              int64_t C, float eps, int center, int offset) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* row = x + t * C;
    S* to = out + t * C;
    if (delta) {
      const S* d = delta + t * C;
      S* both = sum + t * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) put(both + c, get(row + c) + get(d + c));
      row = both;
    }
    const float mean =
        center ? ordered_sum(C, [&](int64_t c) { return get(row + c); }) / float(C) : 0.0f;
    const float square = ordered_sum(C, [&](int64_t c) {
      const float v = get(row + c) - mean;
      return v * v;
    });
    const float scale = 1.0f / std::sqrt(square / float(C) + eps);
    if (center) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c)
        put(to + c, (get(row + c) - mean) * scale * get(weight + c) + (bias ? get(bias + c) : 0.0f));
    } else if (offset) {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) put(to + c, get(row + c) * scale * (1.0f + get(weight + c)));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < C; ++c)
        put(to + c, rounded<S>(get(row + c) * scale) * get(weight + c));
    }
  }
}

template <typename S>
void rotate_and_write(S* qkv, const S* cos, const S* sin, S* cache, const int64_t* slots, int64_t T,
                      int64_t H, int64_t K, int64_t D, int64_t rotary) {
  const int64_t half = rotary / 2;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    S* row = qkv + t * (H + 2 * K) * D;
    const S* c = cos + t * rotary;
    const S* s = sin + t * rotary;
    for (int64_t h = 0; h < H + K; ++h) {
      S* x = row + h * D;
#pragma omp simd
      for (int64_t d = 0; d < half; ++d) {
        const float a = get(x + d), b = get(x + half + d);
        put(x + d, rounded<S>(a * get(c + d)) - rounded<S>(b * get(s + d)));
        put(x + half + d,
            rounded<S>(b * get(c + half + d)) + rounded<S>(a * get(s + half + d)));
      }
    }
    const int64_t block = slots[t] / P, place = slots[t] % P;
    for (int64_t k = 0; k < K; ++k) {
      S* key = cache + (block * 2 * K + k) * P * D + 2 * place;
      S* value = cache + (block * 2 * K + K + k) * P * D + place / 2 * 2 * D + place % 2;
      for (int64_t d = 0; d < D; ++d) key[d / 2 * 2 * P + d % 2] = row[(H + k) * D + d];
      for (int64_t d = 0; d < D; ++d) value[2 * d] = row[(H + K + k) * D + d];
    }
  }
}

// Attention goes through tiles: some tokens next to each other, for one key head. Blocks that all
// tokens of a tile look at (a group's prompt, a prefill's past) are read once for all their queries;
// then each token's own. A query's sums have the same order either way.
constexpr int64_t QUERIES = 12;  // of a tile, where a head's own are not more

// Calls `body` with the number of queries from r on that it shall take, as a constant.
template <typename Body>
inline void in_chunks(int64_t queries, Body body) {
  int64_t r = 0;
  for (; queries - r >= 12; r += 12) body.template operator()<12>(r);
  for (; queries - r >= 4; r += 4) body.template operator()<4>(r);
  if (queries - r == 3) body.template operator()<3>(r);
  if (queries - r == 2) body.template operator()<2>(r);
  if (queries - r == 1) body.template operator()<1>(r);
}

// Scores of RT queries, D apart, against WB blocks of keys, into rows L apart. Lanes are positions.
template <typename S, int64_t FIXED, int64_t RT, int64_t WB>
inline void score(const S* q, int64_t size, const S* const* keys, float* scores, int64_t L,
                  float softcap) {
  const int64_t D = FIXED ? FIXED : size;
  Lanes sum[RT][WB] = {};
  for (int64_t d = 0; d < D; d += 2) {
    Pairs<S> two[WB];
#pragma GCC unroll 4
    for (int64_t w = 0; w < WB; ++w) two[w] = Pairs<S>::get(keys[w] + d * P);
#pragma GCC unroll 12
    for (int64_t r = 0; r < RT; ++r) {
      const Pairs<S> pair = Pairs<S>::every(q + r * D + d);
#pragma GCC unroll 4
      for (int64_t w = 0; w < WB; ++w) sum[r][w] = dot(sum[r][w], pair, two[w]);
    }
  }
  for (int64_t r = 0; r < RT; ++r)
    for (int64_t w = 0; w < WB; ++w) {
      float* to = scores + r * L + w * P;
      S some[P];
      put16(some, sum[r][w]);
      put16(to, get16(some));
      if (softcap > 0)
        for (int64_t p = 0; p < P; ++p) to[p] = std::tanh(to[p] / softcap) * softcap;
    }
}

// The probabilities of the scores from..to of a row of L; the rest is 0. The sum, too, has PyTorch's
// order: lanes, then their halves. Returns the log of the sum of exponentials.
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

// Adds to RT sums, D apart, the values of some blocks, weighted by rows L apart of which the first
// `count` matter. Lanes are dimensions.
template <typename S, int64_t FIXED, int64_t RT>
inline void weigh(const S* weights, int64_t L, int64_t count, const S* values,
                  const int64_t* blocks, int64_t step, int64_t size, float* sums) {
  constexpr int64_t PARTS = FIXED ? (RT > 4 ? 2 : 4) : 1;
  const int64_t D = FIXED ? FIXED : size;
  for (int64_t c = 0; c < D; c += 16 * PARTS) {
    const int64_t width = std::min<int64_t>(16 * PARTS, D - c);
    alignas(64) float some[RT][16 * PARTS] = {};
    Lanes sum[RT][PARTS];
    for (int64_t r = 0; r < RT; ++r) std::copy_n(sums + r * D + c, width, some[r]);
    for (int64_t r = 0; r < RT; ++r)
      for (int64_t n = 0; n < PARTS; ++n) sum[r][n] = get16(some[r] + 16 * n);
    for (int64_t p = 0; p < count; p += 2) {
      const S* at = values + blocks[p / P] * step + p % P * D + 2 * c;
      Pairs<S> two[PARTS];
      if (FIXED || width == 16) {
#pragma GCC unroll 4
        for (int64_t n = 0; n < PARTS; ++n) two[n] = Pairs<S>::get(at + 32 * n);
      } else {  // the last dimensions of a head whose size is not a multiple of 16
        S few[32] = {};
        std::copy_n(at, 2 * width, few);
        two[0] = Pairs<S>::get(few);
      }
#pragma GCC unroll 12
      for (int64_t r = 0; r < RT; ++r) {
        const Pairs<S> pair = Pairs<S>::every(weights + r * L + p);
#pragma GCC unroll 4
        for (int64_t n = 0; n < PARTS; ++n) sum[r][n] = dot(sum[r][n], pair, two[n]);
      }
    }
    for (int64_t r = 0; r < RT; ++r) {
      for (int64_t n = 0; n < PARTS; ++n) std::memcpy(some[r] + 16 * n, &sum[r][n], sizeof(Lanes));
      std::copy_n(some[r], width, sums + r * D + c);
    }
  }
}

template <typename S, int64_t FIXED>
void attend_size(const S* query, int64_t stride, const S* cache, const int64_t* table,
                 const int64_t* rows, const int64_t* positions, S* out, int64_t T, int64_t H,
                 int64_t K, int64_t size, int64_t width, float scaling, int64_t window,
                 float softcap) {
  const int64_t D = FIXED ? FIXED : size, R = H / K, M = std::max<int64_t>(1, QUERIES / R);
  const int64_t step = 2 * K * P * D;  // from block to block
  std::vector<float> floats;
  std::vector<S> numbers;
#pragma omp for collapse(2) schedule(dynamic, 1)
  for (int64_t t0 = 0; t0 < T; t0 += M) {
    for (int64_t k = 0; k < K; ++k) {
      const S* keys = cache + k * P * D;
      const S* values = keys + K * P * D;
      const int64_t n = std::min(M, T - t0);
      const auto blocks = [&](int64_t i) { return table + rows[t0 + i] * width; };
      const auto first = [&](int64_t i) {
        return window > 0 ? std::max<int64_t>(0, positions[t0 + i] + 1 - window) / P : 0;
      };
      const auto last = [&](int64_t i) { return positions[t0 + i] / P; };
      int64_t shared = n > 1 && window == 0 ? last(0) : 0, L = P;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t most = std::min(shared, last(i));
        shared = std::mismatch(blocks(0), blocks(0) + most, blocks(i)).first - blocks(0);
        L = std::max(L, (last(i) - first(i) + 1) * P);
      }
      floats.resize(size_t(n * R * (D + L)));
      numbers.resize(floats.size());
      float* sums = floats.data();
      float* scores = sums + n * R * D;
      S* q = numbers.data();
      S* weights = q + n * R * D;
      std::fill(sums, scores, 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        const S* from = query + (t0 + i) * stride + k * R * D;
#pragma omp simd
        for (int64_t j = 0; j < R * D; ++j) put(q + i * R * D + j, get(from + j) * scaling);
      }

      for (int64_t w = 0; w < shared; ++w) {
        const S* key = keys + blocks(0)[w] * step;
        in_chunks(n * R, [&]<int64_t RT>(int64_t r) {
          score<S, FIXED, RT, 1>(q + r * D, D, &key, scores + r * L + w * P, L, softcap);
        });
      }
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t w = std::max(shared, first(i)); w <= last(i);) {
          constexpr int64_t WB = 4;
          const S* some[WB];
          for (int64_t b = 0; b < std::min(WB, last(i) + 1 - w); ++b) {
            some[b] = keys + blocks(i)[w + b] * step;
            // Blocks lie anywhere, so the processor cannot guess what is read next.
            const S* ahead = keys + blocks(i)[std::min(last(i), w + b + WB)] * step;
            for (int64_t d = 0; d < P * D; d += 64 / int64_t(sizeof(S))) {
              __builtin_prefetch(some[b] + K * P * D + d);
              __builtin_prefetch(ahead + d);
            }
          }
          const bool whole = w + WB <= last(i) + 1;
          float* to = scores + i * R * L + (w - first(i)) * P;
          in_chunks(R, [&]<int64_t RT>(int64_t r) {
            const S* from = q + (i * R + r) * D;
            if (whole && RT <= 4)
              score<S, FIXED, RT, RT <= 4 ? WB : 1>(from, D, some, to + r * L, L, softcap);
            else
              for (int64_t b = 0; b < std::min(WB, last(i) + 1 - w); ++b)
                score<S, FIXED, RT, 1>(from, D, some + b, to + r * L + b * P, L, softcap);
          });
          w += WB;
        }
        const int64_t end = positions[t0 + i] + 1, begin = window > 0 ? end - window : 0;
        for (int64_t r = 0; r < R; ++r)
          softmax(scores + (i * R + r) * L, weights + (i * R + r) * L,
                  std::max<int64_t>(0, begin - first(i) * P), end - first(i) * P,
                  (last(i) - first(i) + 1) * P);
      }

      in_chunks(n * R, [&]<int64_t RT>(int64_t r) {
        weigh<S, FIXED, RT>(weights + r * L, L, shared * P, values, blocks(0), step, D,
                            sums + r * D);
      });
      for (int64_t i = 0; i < n; ++i) {
        const int64_t from = std::max(shared, first(i));
        in_chunks(R, [&]<int64_t RT>(int64_t r) {
          weigh<S, FIXED, RT>(weights + (i * R + r) * L + (from - first(i)) * P, L,
                              positions[t0 + i] + 1 - from * P, values, blocks(i) + from, step, D,
                              sums + (i * R + r) * D);
        });
        S* to = out + ((t0 + i) * H + k * R) * D;
#pragma omp simd
        for (int64_t j = 0; j < R * D; ++j) put(to + j, sums[i * R * D + j]);
      }
    }
  }
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
// out [M, N] = x [M, K] weight^T + bias, in float. A weight's number [n, k] lies at n * down + k * right.
//
// Lanes are rows of x, so that a row's sums have one order whatever stands beside it; a matrix library
// orders them by how many rows there are.
#ifdef __AVX512F__
constexpr int64_t OUTPUTS = 8, LANES = 3;  // of 16 rows: what the registers hold beside their operands
#else
constexpr int64_t OUTPUTS = 4, LANES = 1;
#endif
constexpr int64_t PART = 256;  // terms that are added up before they are added to the sum

template <int64_t NB, int64_t MB>
inline void rows_tile(const float* x, int64_t K, const float* weight, int64_t down, int64_t right,
                      const float* bias, float* out, int64_t N, int64_t rows) {
  Lanes total[NB][MB] = {};
  for (int64_t k0 = 0; k0 < K; k0 += PART) {
    Lanes sum[NB][MB] = {};
    for (int64_t k = k0; k < std::min(K, k0 + PART); ++k) {
      Lanes of[MB];
#pragma GCC unroll 3
      for (int64_t m = 0; m < MB; ++m) of[m] = get16(x + (m * K + k) * 16);
#pragma GCC unroll 8
      for (int64_t n = 0; n < NB; ++n) {
        const Lanes w = every(weight[n * down + k * right]);
#pragma GCC unroll 3
        for (int64_t m = 0; m < MB; ++m) sum[n][m] = fma16(w, of[m], sum[n][m]);
      }
    }
    for (int64_t n = 0; n < NB; ++n)
      for (int64_t m = 0; m < MB; ++m) total[n][m] += sum[n][m];
  }
  alignas(64) float some[NB][16 * MB];
  for (int64_t n = 0; n < NB; ++n)
    for (int64_t m = 0; m < MB; ++m) put16(some[n] + 16 * m, total[n][m]);
  for (int64_t r = 0; r < std::min(rows, 16 * MB); ++r)
    for (int64_t n = 0; n < NB; ++n) out[r * N + n] = some[n][r] + (bias ? bias[n] : 0.0f);
}

void multiply_rows(const float* x, const float* weight, const float* bias, float* out, int64_t M,
                   int64_t N, int64_t K, int64_t down, int64_t right) {
  static thread_local std::vector<float> turned;  // [rows / 16, K, 16], filled up with zeros
  const int64_t some = std::max<int64_t>(1, (1 << 17) / K / (16 * LANES)) * 16 * LANES;
  for (int64_t m0 = 0; m0 < M; m0 += some) {
    const int64_t rows = std::min(some, M - m0), sixteens = (rows + 15) / 16;
    turned.assign(size_t(sixteens * 16 * K), 0.0f);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < K; ++k) turned[size_t((r / 16 * K + k) * 16 + r % 16)] = x[(m0 + r) * K + k];
#pragma omp for schedule(static) nowait
    for (int64_t strip = 0; strip < (N + OUTPUTS - 1) / OUTPUTS; ++strip) {
      const int64_t end = std::min(N, (strip + 1) * OUTPUTS);
      for (int64_t m = 0; m < sixteens; m += LANES) {
        const auto outputs = [&]<int64_t NB>(int64_t n) {
          const auto go = [&]<int64_t MB>() {
            rows_tile<NB, MB>(turned.data() + m * 16 * K, K, weight + n * down, down, right,
                              bias ? bias + n : nullptr, out + (m0 + m * 16) * N + n, N, rows - m * 16);
          };
          const int64_t left = std::min(LANES, sixteens - m);
          if (left == 1) go.template operator()<1>();
          if constexpr (LANES > 1) {
            if (left == 2) go.template operator()<2>();
            if (left == 3) go.template operator()<3>();
          }
        };
        int64_t n = strip * OUTPUTS;
        for (; n + OUTPUTS <= end; n += OUTPUTS) outputs.template operator()<OUTPUTS>(n);
        for (; n < end; ++n) outputs.template operator()<1>(n);
      }
    }
  }
#pragma omp barrier
}
#endif

#ifdef __AVX512BF16__
constexpr int64_t COLUMNS = 3, ROWS = 8;  // of 16: what the registers hold beside their operands

// A weight [N, K], K even, as [N / 16, K / 2, 16, 2], padded with zeros: a row of 32 numbers is what one
// bf16 dot-product instruction takes for 16 outputs.
inline void pack_strip(const Half* weight, Half* packed, int64_t N, int64_t K, int64_t n0) {
  const int64_t pairs = K / 2;
  for (int64_t k0 = 0; k0 < pairs; k0 += 16) {
    const int64_t some = std::min<int64_t>(16, pairs - k0);
    uint32_t square[16][16] = {};
    for (int64_t n = 0; n < std::min<int64_t>(16, N - n0); ++n)
      std::memcpy(square[n], weight + (n0 + n) * K + 2 * k0, size_t(some) * 4);
    Half* to = packed + (n0 / 16 * pairs + k0) * 32;
    for (int64_t k = 0; k < some; ++k) {
      uint32_t row[16];
      for (int64_t n = 0; n < 16; ++n) row[n] = square[n][k];
      std::memcpy(to + k * 32, row, sizeof row);
    }
  }
}
void pack(const Half* weight, Half* packed, int64_t N, int64_t K) {
#pragma omp for schedule(static)
  for (int64_t n0 = 0; n0 < N; n0 += 16) pack_strip(weight, packed, N, K, n0);
}
inline void pack_rows(const Half* weight, Half* packed, int64_t N, int64_t K) {
  for (int64_t n0 = 0; n0 < N; n0 += 16) pack_strip(weight, packed, N, K, n0);
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
inline void tile(const Half* x, int64_t K, const Half* packed, const Half* ahead,
                 const Half* bias, Half* out, int64_t N, int64_t n0) {
  const int64_t pairs = K / 2;
  __m512 sum[MB][NB], total[MB][NB];
  // Long sums are made of parts as oneDNN makes them in the training gear, so that both round alike.
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
        w[n] = (__m512bh)_mm512_loadu_si512(packed + (n * pairs + k) * 32);
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

#ifdef __AMX_BF16__
// Whether the system lets this process use the tile registers, which it must ask for.
bool may_use_tiles() {
  static const bool may = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return may;
}

// Eight tiles of 16 rows of 64 bytes, while it lives; then as they were, for whoever set them up.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_loadconfig(before_); }

 private:
  alignas(64) uint8_t before_[64];
};

// The sums of a block of rows, not yet rounded and written.
struct Sums {
  alignas(64) float at[32][32];
  Half* out;
  int64_t n, columns, count = 0, written = 0;

  void write(int64_t rows, const Half* bias, int64_t N) {
    for (const int64_t end = std::min(count, written + rows); written < end; ++written)
      for (int64_t c = 0; c < columns; c += 16)
        put_outputs(get16(at[written] + c), bias, out + written * N, N, n + c);
  }
};

// `tile` of 16 MB rows by tile registers, K a multiple of 32. Each sum goes in one order whatever the
// rows beside: what is sampled does not depend on them. What was summed `before` is written meanwhile.
template <int64_t MB, int64_t NB>
inline void amx_tile(const Half* x, int64_t K, const Half* packed, const Half* ahead,
                     const Half* bias, int64_t N, Sums& sums, Sums& before) {
  const int64_t some = 1024 / K + 1;  // rows a step, so that all are written in K / 32 steps
  _tile_zero(0);
  if (NB > 1) _tile_zero(1);
  if (MB > 1) _tile_zero(2);
  if (MB > 1 && NB > 1) _tile_zero(3);
  for (int64_t k = 0; k < K; k += 32) {
    if (ahead)
      for (int64_t line = 0; line < 16; ++line)
        __builtin_prefetch(ahead + k * 16 + line * 32, 0, 2);
    _tile_loadd(4, x + k, K * 2);
    if (MB > 1) _tile_loadd(5, x + 16 * K + k, K * 2);
    _tile_loadd(6, packed + k * 16, 64);
    if (NB > 1) _tile_loadd(7, packed + K * 16 + k * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (NB > 1) _tile_dpbf16ps(1, 4, 7);
    if (MB > 1) _tile_dpbf16ps(2, 5, 6);
    if (MB > 1 && NB > 1) _tile_dpbf16ps(3, 5, 7);
    before.write(some, bias, N);
  }
  _tile_stored(0, sums.at[0], 128);
  if (NB > 1) _tile_stored(1, sums.at[0] + 16, 128);
  if (MB > 1) _tile_stored(2, sums.at[16], 128);
  if (MB > 1 && NB > 1) _tile_stored(3, sums.at[16] + 16, 128);
  std::atomic_signal_fence(std::memory_order_seq_cst);  // compilers do not see what tiles write
}

// `multiply` by tile registers.
void amx_multiply(const Half* x, const Half* packed, const Half* bias, Half* out, int64_t M,
                  int64_t N, int64_t K) {
  constexpr int64_t BLOCK = 192;
  const int64_t columns = (N + 15) / 16, strips = (columns + 1) / 2;
  const Tiles tiles;
  // Tiles read whole: the last rows, of which there may be fewer than 16, are read here.
  static thread_local std::vector<Half> last;
  const int64_t whole = M / 16 * 16;
  if (whole < M) {
    last.assign(size_t(16 * K), Half{0});
    std::copy(x + whole * K, x + M * K, last.begin());
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  Sums sums[2];
  int64_t turn = 0;
  for (int64_t m0 = 0; m0 < M; m0 += BLOCK) {
    const int64_t m1 = std::min(M, m0 + BLOCK);
#pragma omp for schedule(static) nowait
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t n = strip * 32;
      const Half* w = packed + n * K;
      // As in `multiply`: the next strip comes nearer, a half with each of the first blocks.
      const int64_t halves = std::clamp<int64_t>(columns - 2 * (strip + 1), 0, 2);
      int64_t block = 0;
      const auto rows = [&]<int64_t MB>(int64_t m) {
        const Half* from = m < whole ? x + m * K : last.data();
        const Half* ahead = block < halves ? w + (2 + block) * 16 * K : nullptr;
        ++block;
        Sums &now = sums[turn], &before = sums[turn ^= 1];
        const bool wide = 2 * strip + 1 < columns;
        if (wide) amx_tile<MB, 2>(from, K, w, ahead, bias, N, now, before);
        else amx_tile<MB, 1>(from, K, w, ahead, bias, N, now, before);
        now.out = out + m * N, now.n = n, now.columns = wide ? 32 : 16;
        now.count = std::min(16 * MB, m1 - m), now.written = 0;
      };
      int64_t m = m0;
      for (; m + 32 <= m1; m += 32) rows.template operator()<2>(m);
      for (; m < m1; m += 16) rows.template operator()<1>(m);
    }
  }
  sums[turn ^ 1].write(32, bias, N);
#pragma omp barrier
}
#endif

// out [M, N] = x [M, K] weight^T + bias, K even. Rows go in blocks that stay in the second cache.
void multiply(const Half* x, const Half* packed, const Half* bias, Half* out, int64_t M, int64_t N,
              int64_t K) {
#ifdef __AMX_BF16__
  if (K % 32 == 0 && may_use_tiles()) return amx_multiply(x, packed, bias, out, M, N, K);
#endif
  constexpr int64_t BLOCK = 192;
  const int64_t columns = (N + 15) / 16, strips = (columns + COLUMNS - 1) / COLUMNS;
  for (int64_t m0 = 0; m0 < M; m0 += BLOCK) {
    const int64_t m1 = std::min(M, m0 + BLOCK);
#pragma omp for schedule(static) nowait
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t c = strip * COLUMNS, wide = std::min(COLUMNS, columns - c);
      const Half* w = packed + c * 16 * K;
      // While a strip is multiplied, the next one comes nearer, a third with each block of rows.
      const Half* next = strip + 1 < strips ? w + COLUMNS * 16 * K : w;
      int64_t block = 0;
      const auto rows = [&]<int64_t MB>(int64_t m) {
        const Half* from = x + m * K;
        Half* to = out + m * N;
        const Half* ahead = next + (block++ % COLUMNS) * 16 * K;
        if (wide == 3) tile<MB, 3>(from, K, w, ahead, bias, to, N, c * 16);
        if (wide == 2) tile<MB, 2>(from, K, w, ahead, bias, to, N, c * 16);
        if (wide == 1) tile<MB, 1>(from, K, w, ahead, bias, to, N, c * 16);
      };
      int64_t m = m0;
      for (; m + ROWS <= m1; m += ROWS) rows.template operator()<ROWS>(m);
      for (; m + 4 <= m1; m += 4) rows.template operator()<4>(m);
      for (; m < m1; ++m) rows.template operator()<1>(m);
    }
  }
#pragma omp barrier
}

// Training attention over packed sequences, bf16. A sequence's keys are its ancestors' tokens, then its
// own up to the query (`window` > 0: the last so many). One thread takes a tree and a key head, so
// that gradients of shared keys are added up in one place.
struct Tree {
  const int64_t* cu;       // where each sequence starts, then the end
  const int64_t* parents;  // or -1; parents come first
  int64_t first, last;     // its sequences
};

// [K, N] rows of 16-bit numbers, `step` apart, as `pack` would pack their transpose; rows and columns
// beyond are zero.
inline void pack_pairs(const Half* rows, int64_t step, int64_t K, int64_t N, Half* packed) {
  const int64_t pairs = (K + 1) / 2;
  for (int64_t k = 0; k < pairs; ++k)
    for (int64_t n = 0; n < N; n += 16) {
      Half some[2][16] = {};
      const int64_t width = std::min<int64_t>(16, N - n);
      std::copy_n(rows + 2 * k * step + n, width, some[0]);
      if (2 * k + 1 < K) std::copy_n(rows + (2 * k + 1) * step + n, width, some[1]);
      Halves low, high;
      std::memcpy(&low, some[0], sizeof low);
      std::memcpy(&high, some[1], sizeof high);
      const Bits both =
          __builtin_convertvector(low, Bits) | (__builtin_convertvector(high, Bits) << 16);
      std::memcpy(packed + (n / 16 * pairs + k) * 32, &both, sizeof both);
    }
}

// out [M, N] = x [M, K] times what was packed; K even.
inline void small_product(const Half* x, const Half* packed, Half* out, int64_t M, int64_t N,
                          int64_t K) {
  const int64_t columns = (N + 15) / 16;
  for (int64_t c = 0; c < columns; c += COLUMNS) {
    const int64_t wide = std::min(COLUMNS, columns - c);
    const Half* w = packed + c * 16 * K;
    const auto rows = [&]<int64_t MB>(int64_t m) {
      if (wide == 3) tile<MB, 3>(x + m * K, K, w, w, nullptr, out + m * N, N, c * 16);
      if (wide == 2) tile<MB, 2>(x + m * K, K, w, w, nullptr, out + m * N, N, c * 16);
      if (wide == 1) tile<MB, 1>(x + m * K, K, w, w, nullptr, out + m * N, N, c * 16);
    };
    int64_t m = 0;
    for (; m + ROWS <= M; m += ROWS) rows.template operator()<ROWS>(m);
    for (; m + 4 <= M; m += 4) rows.template operator()<4>(m);
    for (; m < M; ++m) rows.template operator()<1>(m);
  }
}

// What both passes need of one sequence and key head.
struct Piece {
  std::vector<int64_t> tokens;  // of its keys, L of them
  int64_t S, L, wide;           // its queries; keys; keys rounded up
  std::vector<Half> q, k, v, scores, packed;

  // Queries [S * R, D], scaled, and keys and values [L, D]; then the scores [S * R, wide].
  void read(const Tree& tree, int64_t n, const Half* query, const Half* key, const Half* value,
            int64_t step, int64_t key_step, int64_t value_step, int64_t R, int64_t D, float scaling) {
    tokens.clear();
    std::vector<int64_t> line;
    for (int64_t a = n; a >= 0; a = tree.parents[a]) line.push_back(a);
    for (auto a = line.rbegin(); a != line.rend(); ++a)
      for (int64_t t = tree.cu[*a]; t < tree.cu[*a + 1]; ++t) tokens.push_back(t);
    S = tree.cu[n + 1] - tree.cu[n];
    L = int64_t(tokens.size());
    wide = (L + 15) / 16 * 16;
    q.resize(size_t(S * R * D));
    k.assign(size_t(wide * D), Half{0});
    v.assign(size_t(wide * D), Half{0});
    for (int64_t s = 0; s < S; ++s) {
      const Half* from = query + (tree.cu[n] + s) * step;
#pragma omp simd
      for (int64_t i = 0; i < R * D; ++i) put(q.data() + s * R * D + i, get(from + i) * scaling);
    }
    for (int64_t l = 0; l < L; ++l) {
      std::copy_n(key + tokens[size_t(l)] * key_step, D, k.data() + l * D);
      std::copy_n(value + tokens[size_t(l)] * value_step, D, v.data() + l * D);
    }
    scores.resize(size_t(S * R * wide));
    packed.resize(size_t(wide * std::max((D + 15) / 16 * 16, S * R + 1)));
    pack_rows(k.data(), packed.data(), wide, D);
    small_product(q.data(), packed.data(), scores.data(), S * R, wide, D);
  }
  // The keys [from, to) that query s sees.
  int64_t to(int64_t s) const { return L - S + s + 1; }
  int64_t from(int64_t s, int64_t window) const {
    return window > 0 ? std::max<int64_t>(0, to(s) - window) : 0;
  }
};

void packed_attend(const Half* query, const Half* key, const Half* value, Half* out, float* norms,
                   const int64_t* cu, const int64_t* parents, const int64_t* trees, int64_t count,
                   int64_t step, int64_t key_step, int64_t value_step, int64_t H, int64_t K,
                   int64_t D, float scaling, int64_t window) {
  const int64_t R = H / K;
  Piece p;
  std::vector<float> row;
  std::vector<Half> seen;
#pragma omp for collapse(2) schedule(dynamic, 1)
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t k = 0; k < K; ++k) {
      const Tree tree{cu, parents, trees[g], trees[g + 1]};
      for (int64_t n = tree.first; n < tree.last; ++n) {
        p.read(tree, n, query + k * R * D, key + k * D, value + k * D, step, key_step, value_step, R,
               D, scaling);
        row.resize(size_t(p.wide));
        for (int64_t m = 0; m < p.S * R; ++m) {
          Half* at = p.scores.data() + m * p.wide;
          float* s = row.data();
          const int64_t from = p.from(m / R, window), to = p.to(m / R);
#pragma omp simd
          for (int64_t j = 0; j < p.wide; ++j) s[j] = get(at + j);
          norms[(cu[n] + m / R) * H + k * R + m % R] = softmax(s, at, from, to, p.wide);
        }
        pack_pairs(p.v.data(), D, p.wide, D, p.packed.data());
        seen.resize(size_t(p.S * R * D));
        small_product(p.scores.data(), p.packed.data(), seen.data(), p.S * R, D, p.wide);
        for (int64_t s = 0; s < p.S; ++s)
          std::copy_n(seen.data() + s * R * D, R * D, out + ((cu[n] + s) * H + k * R) * D);
      }
    }
  }
}

// Gradients into `query_grad` [T, H, D] and `key_grad`, `value_grad` [T, K, D].
void packed_attend_backward(const Half* query, const Half* key, const Half* value, const Half* out,
                            const Half* out_grad, const float* norms, Half* query_grad,
                            Half* key_grad, Half* value_grad, const int64_t* cu,
                            const int64_t* parents, const int64_t* trees, int64_t count,
                            int64_t step, int64_t key_step, int64_t value_step, int64_t H, int64_t K,
                            int64_t D, float scaling, int64_t window) {
  const int64_t R = H / K;
  Piece p;
  std::vector<float> keys, values;
  std::vector<Half> dout, dscores, turned, product;
#pragma omp for collapse(2) schedule(dynamic, 1)
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t k = 0; k < K; ++k) {
      const Tree tree{cu, parents, trees[g], trees[g + 1]};
      const int64_t start = cu[tree.first], length = cu[tree.last] - start;
      keys.assign(size_t(length * D), 0.0f);
      values.assign(size_t(length * D), 0.0f);
      for (int64_t n = tree.first; n < tree.last; ++n) {
        p.read(tree, n, query + k * R * D, key + k * D, value + k * D, step, key_step, value_step, R,
               D, scaling);
        const int64_t M = p.S * R, even = M + M % 2;
        dout.resize(size_t(M * D));
        for (int64_t s = 0; s < p.S; ++s)
          std::copy_n(out_grad + ((cu[n] + s) * H + k * R) * D, R * D, dout.data() + s * R * D);
        dscores.resize(size_t(M * p.wide));
        pack_rows(p.v.data(), p.packed.data(), p.wide, D);
        small_product(dout.data(), p.packed.data(), dscores.data(), M, p.wide, D);
        for (int64_t m = 0; m < M; ++m) {
          const int64_t place = (cu[n] + m / R) * H + k * R + m % R;
          float along = 0;
#pragma omp simd reduction(+ : along)
          for (int64_t d = 0; d < D; ++d) along += get(out + place * D + d) * get(dout.data() + m * D + d);
          Half* weight = p.scores.data() + m * p.wide;
          Half* change = dscores.data() + m * p.wide;
          const int64_t from = p.from(m / R, window), to = p.to(m / R);
          const float norm = norms[place];
          std::fill(weight, weight + from, Half{0});
          std::fill(change, change + from, Half{0});
#pragma omp simd
          for (int64_t j = from; j < to; ++j) {
            const float w = fast_exp(get(weight + j) - norm);
            put(change + j, w * (get(change + j) - along));
            put(weight + j, w);
          }
          std::fill(weight + to, weight + p.wide, Half{0});
          std::fill(change + to, change + p.wide, Half{0});
        }
        // queries: dS K
        product.resize(size_t(std::max(M, p.wide) * D));
        pack_pairs(p.k.data(), D, p.wide, D, p.packed.data());
        small_product(dscores.data(), p.packed.data(), product.data(), M, D, p.wide);
        for (int64_t s = 0; s < p.S; ++s) {
          Half* to = query_grad + ((cu[n] + s) * H + k * R) * D;
#pragma omp simd
          for (int64_t i = 0; i < R * D; ++i) put(to + i, get(product.data() + s * R * D + i) * scaling);
        }
        // values: dO^T P, and keys: Q^T dS; both come out turned, [D, wide]
        const auto add = [&](const Half* left, const Half* right, std::vector<float>& sums) {
          turned.assign(size_t(D * even), Half{0});
          for (int64_t m = 0; m < M; ++m)
            for (int64_t d = 0; d < D; ++d) turned[size_t(d * even + m)] = left[m * D + d];
          pack_pairs(right, p.wide, M, p.wide, p.packed.data());
          small_product(turned.data(), p.packed.data(), product.data(), D, p.wide, even);
          for (int64_t l = 0; l < p.L; ++l) {
            float* to = sums.data() + (p.tokens[size_t(l)] - start) * D;
            for (int64_t d = 0; d < D; ++d) to[d] += get(product.data() + d * p.wide + l);
          }
        };
        add(dout.data(), p.scores.data(), values);
        add(p.q.data(), dscores.data(), keys);
      }
      for (int64_t t = 0; t < length; ++t)
        for (int64_t d = 0; d < D; ++d) {
          put(key_grad + ((start + t) * K + k) * D + d, keys[size_t(t * D + d)]);
          put(value_grad + ((start + t) * K + k) * D + d, values[size_t(t * D + d)]);
        }
    }
  }
}
#endif

template <typename S>
void gate(const S* both, S* out, int64_t T, int64_t F, int tanh_gelu) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* g = both + t * 2 * F;
    S* to = out + t * F;
    if (tanh_gelu) {
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) {
        const float x = get(g + f);
        const float z = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        const float th = 1.0f - 2.0f / (fast_exp(2.0f * z) + 1.0f);
        put(to + f, rounded<S>(0.5f * x * (1.0f + th)) * get(g + F + f));
      }
    } else {
#pragma omp simd
      for (int64_t f = 0; f < F; ++f) {
        const float x = get(g + f);
        put(to + f, rounded<S>(x / (1.0f + fast_exp(-x))) * get(g + F + f));
      }
    }
  }
}

// The backward pass of add_norm without a mean: `grad` [T, C] is what flows back to the sum x that was
// normed, and already holds what came by the residual stream; `weight_grad` is added to, a row of C
// floats for each thread.
template <typename S>
void norm_backward(const S* x, const S* weight, const S* out_grad, S* grad, float* weight_grad,
                   int64_t T, int64_t C, float eps, int offset) {
  float* own = weight_grad + omp_get_thread_num() * C;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* row = x + t * C;
    const S* dy = out_grad + t * C;
    S* dx = grad + t * C;
    float square = 0, along = 0;
#pragma omp simd reduction(+ : square, along)
    for (int64_t c = 0; c < C; ++c) {
      const float v = get(row + c), w = get(weight + c) + float(offset);
      square += v * v;
      along += v * w * get(dy + c);
    }
    const float scale = 1.0f / std::sqrt(square / float(C) + eps);
    const float back = along * scale * scale * scale / float(C);
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const float v = get(row + c), d = get(dy + c), w = get(weight + c) + float(offset);
      put(dx + c, get(dx + c) + d * w * scale - v * back);
      own[c] += d * v * scale;
    }
  }
}

// The backward pass of gate: [T, F] gradients of the result -> [T, 2F] of both halves.
template <typename S>
void gate_backward(const S* both, const S* out_grad, S* grad, int64_t T, int64_t F, int tanh_gelu) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* g = both + t * 2 * F;
    const S* d = out_grad + t * F;
    S* to = grad + t * 2 * F;
#pragma omp simd
    for (int64_t f = 0; f < F; ++f) {
      const float x = get(g + f), up = get(g + F + f), dy = get(d + f);
      float act, slope;
      if (tanh_gelu) {
        const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        const float th = 1.0f - 2.0f / (fast_exp(2.0f * inner) + 1.0f);
        act = 0.5f * x * (1.0f + th);
        slope = 0.5f * (1.0f + th) + 0.5f * x * (1.0f - th * th) * 0.79788456080286536f *
                                         (1.0f + 3.0f * 0.044715f * x * x);
      } else {
        const float sigmoid = 1.0f / (1.0f + fast_exp(-x));
        act = x * sigmoid;
        slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
      }
      put(to + f, dy * up * slope);
      put(to + F + f, dy * rounded<S>(act));
    }
  }
}

// Rotates the first H heads of [T, heads, D] in place, by the angle or (`sign` -1) back.
template <typename S>
void rotate(S* x, const S* cos, const S* sin, int64_t T, int64_t H, int64_t heads, int64_t D,
            int64_t rotary, float sign) {
  const int64_t half = rotary / 2;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* c = cos + t * rotary;
    const S* s = sin + t * rotary;
    for (int64_t h = 0; h < H; ++h) {
      S* row = x + (t * heads + h) * D;
#pragma omp simd
      for (int64_t d = 0; d < half; ++d) {
        const float a = get(row + d), b = get(row + half + d);
        const float sa = sign * get(s + d), sb = sign * get(s + half + d);
        put(row + d, rounded<S>(a * get(c + d)) - rounded<S>(b * sa));
        put(row + half + d, rounded<S>(b * get(c + half + d)) + rounded<S>(a * sb));
      }
    }
  }
}

// What a row of logits says of its target: log p(target) and the entropy of p = softmax(logits /
// temperature); `norm` is the log of the sum, which the backward pass needs.
template <typename S>
void score(const S* logits, const int64_t* targets, float* logprobs, float* entropy, float* norm,
           int64_t M, int64_t V, float temperature) {
  constexpr int64_t BLOCK = 256;
  const float factor = 1.0f / temperature;
#pragma omp for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    const S* row = logits + m * V;
    float top = get(row) * factor;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < V; ++v) top = std::max(top, get(row + v) * factor);
    double total = 0, along = 0;
    for (int64_t from = 0; from < V; from += BLOCK) {
      float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
      for (int64_t v = from; v < std::min(V, from + BLOCK); ++v) {
        const float x = get(row + v) * factor - top, e = fast_exp(x);
        sum += e;
        weighted += e * std::max(x, -1e30f);  // of -inf, e is 0
      }
      total += sum;
      along += weighted;
    }
    const double log_total = std::log(total);
    logprobs[m] = float(double(get(row + targets[m]) * factor - top) - log_total);
    entropy[m] = float(log_total - along / total);
    norm[m] = float(top + log_total);
  }
}

// Turns logits into the gradient that comes back to them: d log p(t) / dx = (onehot_t - p) / T and
// dH / dx = -p (log p + H) / T. `entropy_grad` may be null.
template <typename S>
void score_backward(S* logits, const int64_t* targets, const float* entropy, const float* norm,
                    const float* logprob_grad, const float* entropy_grad, int64_t M, int64_t V,
                    float temperature) {
  const float factor = 1.0f / temperature;
#pragma omp for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    S* row = logits + m * V;
    const float dl = logprob_grad[m], dh = entropy_grad ? entropy_grad[m] : 0.0f;
    const float base = -dl - dh * entropy[m], offset = norm[m];
    const float at = get(row + targets[m]) * factor - offset;
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) {
      const float x = std::max(get(row + v) * factor - offset, -1e30f);
      put(row + v, fast_exp(x) * (base - dh * x) * factor);
    }
    put(row + targets[m], (dl + fast_exp(at) * (base - dh * at)) * factor);
  }
}

// One token a row by inverse CDF in two levels; see sampler.py, which says what it computes.
template <typename S>
void draw(const S* logits, const float* temperature, const double* uniform, int64_t* tokens,
          float* logprobs, int64_t B, int64_t V) {
  constexpr int64_t BLOCK = 256;
  const int64_t blocks = (V + BLOCK - 1) / BLOCK;
  std::vector<double> ends(static_cast<size_t>(blocks));
#pragma omp for schedule(dynamic, 1)
  for (int64_t b = 0; b < B; ++b) {
    const S* row = logits + b * V;
    const bool greedy = temperature[b] == 0.0f;
    const float factor = 1.0f / (greedy ? 1.0f : temperature[b]);
    float top = get(row) * factor;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < V; ++v) top = std::max(top, get(row + v) * factor);
    double total = 0;
    for (int64_t g = 0; g < blocks; ++g) {
      const int64_t last = std::min(V, (g + 1) * BLOCK);
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t v = g * BLOCK; v < last; ++v) part += fast_exp(get(row + v) * factor - top);
      total += part;
      ends[size_t(g)] = total;
    }
    int64_t token = 0;
    if (greedy) {
      while (token < V - 1 && get(row + token) * factor != top) ++token;
    } else {
      const double target = uniform[b] * total;
      int64_t g = 0;
      while (g < blocks - 1 && !(ends[size_t(g)] > target)) ++g;
      double running = g ? ends[size_t(g - 1)] : 0.0;
      const int64_t last = std::min(V, (g + 1) * BLOCK);
      token = g * BLOCK;
      for (int64_t v = g * BLOCK; v < last; ++v) {  // rounding may pass the end: the last stays
        token = v;
        running += fast_exp(get(row + v) * factor - top);
        if (running > target) break;
      }
    }
    tokens[b] = token;
    logprobs[b] = float(double(get(row + token) * factor - top) - std::log(total));
  }
}

template <typename S>
void attend(const S* query, int64_t stride, const S* cache, const int64_t* table,
            const int64_t* rows, const int64_t* positions, S* out, int64_t T, int64_t H, int64_t K,
            int64_t D, int64_t width, float scaling, int64_t window, float softcap) {
  const auto size = D == 64    ? attend_size<S, 64>
                    : D == 128 ? attend_size<S, 128>
                               : attend_size<S, 0>;
  size(query, stride, cache, table, rows, positions, out, T, H, K, D, width, scaling, window,
       softcap);
}

// A kernel is run by a whole team of threads, which share its loops. It is handed out as a function of
// one array, its arguments in slots of eight bytes (floats as doubles), so that a call can be kept
// and made again, many by one team.
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

struct Call {
  void (*kernel)(const int64_t*);
  const int64_t* slots;
};

}  // namespace

#define EXPORT(NAME, SUFFIX, S) \
  extern "C" void NAME##_##SUFFIX(const int64_t* slots) { call(NAME<S>, slots); }
#define EXPORT_BOTH(NAME) EXPORT(NAME, float, float) EXPORT(NAME, bf16, Half)

EXPORT_BOTH(add_norm)
EXPORT_BOTH(rotate_and_write)
EXPORT_BOTH(attend)
EXPORT_BOTH(gate)
EXPORT_BOTH(draw)
EXPORT_BOTH(norm_backward)
EXPORT_BOTH(gate_backward)
EXPORT_BOTH(rotate)
EXPORT_BOTH(score)
EXPORT_BOTH(score_backward)

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
extern "C" void multiply_rows_float(const int64_t* slots) { call(multiply_rows, slots); }
#endif
#ifdef __AVX512BF16__
extern "C" void pack_bf16(const int64_t* slots) { call(pack, slots); }
extern "C" void multiply_bf16(const int64_t* slots) { call(multiply, slots); }
extern "C" void packed_attend_bf16(const int64_t* slots) { call(packed_attend, slots); }
extern "C" void packed_attend_backward_bf16(const int64_t* slots) {
  call(packed_attend_backward, slots);
}
#endif

// Calls made before, in their order.
extern "C" void replay(const Call* calls, int64_t count) {
#pragma omp parallel
  for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].slots);
}
