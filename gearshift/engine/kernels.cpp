// The generation gear's small operations on a CPU, where a chain of tensor operations would spend
// its time on passes over memory and on dispatch. Compiled at first use (see native.py); every
// function has a slow twin in kernels.py, which tests hold it to. Numbers are computed in float and
// rounded where the twin rounds, so that both give the same model.
//
// Legend: T tokens of one forward, H query heads, K key heads, R = H / K, D head size (even), P
// positions in a block. A block of the cache is [2, K, P * D]: keys as [D, P], values as [P, D].

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
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

template <typename S>
inline float rounded(float x) {
  S s;
  put(&s, x);
  return get(&s);
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
void add_norm(S* x, const S* delta, const S* weight, const S* bias, S* out, int64_t T, int64_t C,
              float eps, int center, int offset) {
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    S* row = x + t * C;
    S* to = out + t * C;
    if (delta) {
      const S* d = delta + t * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) put(row + c, get(row + c) + get(d + c));
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
#pragma omp parallel for schedule(static)
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
      S* key = cache + (block * 2 * K + k) * P * D + place;
      for (int64_t d = 0; d < D; ++d) key[d * P] = row[(H + k) * D + d];
      std::memcpy(cache + ((block * 2 * K + K + k) * P + place) * D, row + (H + K + k) * D,
                  size_t(D) * sizeof(S));
    }
  }
}

// Attention of RT query heads that share a key head, over blocks of P = 16 positions. Sums run over
// one dimension after the other, odd before even, as a processor's bf16 dot product does; lanes are
// positions (for scores; so keys lie as [D, P]) and dimensions (for the weighted sum of values).
template <typename S, int64_t FIXED, int64_t RT>
void attend_heads(const float* q, const S* cache, const int64_t* blocks, S* out, int64_t K,
                  int64_t size, int64_t begin, int64_t end, float softcap, float* scores,
                  float* sum, int64_t k) {
  const int64_t D = FIXED ? FIXED : size, first = begin / P, last = (end - 1) / P;
  const int64_t L = (last - first + 1) * P, from = begin - first * P, to = end - first * P;
  for (int64_t w = first; w <= last; ++w) {
    const S* key = cache + (blocks[w] * 2 * K + k) * P * D;
    float dot[RT][P] = {};
    for (int64_t d = 0; d < D; d += 2) {
      float even[P], odd[P];
      for (int64_t p = 0; p < P; ++p) {
        even[p] = get(key + d * P + p);
        odd[p] = get(key + (d + 1) * P + p);
      }
      for (int64_t r = 0; r < RT; ++r)
        for (int64_t p = 0; p < P; ++p)
          dot[r][p] =
              std::fma(q[r * D + d], even[p], std::fma(q[r * D + d + 1], odd[p], dot[r][p]));
    }
    for (int64_t r = 0; r < RT; ++r)
      for (int64_t p = 0; p < P; ++p) {
        const float x = rounded<S>(dot[r][p]);
        scores[r * L + (w - first) * P + p] = softcap > 0 ? std::tanh(x / softcap) * softcap : x;
      }
  }
  for (int64_t r = 0; r < RT; ++r) {
    float* s = scores + r * L;
    float top = s[from], total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = from; j < to; ++j) top = std::max(top, s[j]);
#pragma omp simd reduction(+ : total)
    for (int64_t j = from; j < to; ++j) {
      s[j] = fast_exp(s[j] - top);
      total += s[j];
    }
#pragma omp simd
    for (int64_t j = from; j < to; ++j) s[j] = rounded<S>(s[j] / total);
    std::fill(s, s + from, 0.0f);
    std::fill(s + to, s + L, 0.0f);
  }
  std::fill(sum, sum + RT * D, 0.0f);
  for (int64_t w = first; w <= last; ++w) {
    const S* value = cache + (blocks[w] * 2 * K + K + k) * P * D;
    const float* s = scores + (w - first) * P;
    const int64_t stop = std::min(P, to - (w - first) * P);
    for (int64_t p = 0; p < stop; p += 2) {
      const S *even = value + p * D, *odd = p + 1 < stop ? even + D : even;
      for (int64_t r = 0; r < RT; ++r) {
        const float a = s[r * L + p], b = p + 1 < stop ? s[r * L + p + 1] : 0.0f;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d)
          sum[r * D + d] = std::fma(a, get(even + d), std::fma(b, get(odd + d), sum[r * D + d]));
      }
    }
  }
#pragma omp simd
  for (int64_t d = 0; d < RT * D; ++d) put(out + d, sum[d]);
}

template <typename S, int64_t FIXED>
void attend(const S* query, int64_t stride, const S* cache, const int64_t* table,
            const int64_t* rows, const int64_t* positions, S* out, int64_t T, int64_t H, int64_t K,
            int64_t D, int64_t width, float scaling, int64_t window, float softcap) {
  const int64_t R = H / K;
#pragma omp parallel
  {
    std::vector<float> buffer;
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int64_t end = positions[t] + 1;
        const int64_t begin = window > 0 ? std::max<int64_t>(0, end - window) : 0;
        buffer.resize(size_t(R * D + 4 * (end + 2 * P) + 4 * D));
        float* q = buffer.data();
        float* sum = q + R * D;
        float* scores = sum + 4 * D;
        for (int64_t i = 0; i < R * D; ++i)
          q[i] = rounded<S>(get(query + t * stride + k * R * D + i) * scaling);
        const auto heads = [&]<int64_t RT>(int64_t r) {
          attend_heads<S, FIXED, RT>(q + r * D, cache, table + rows[t] * width,
                                     out + (t * H + k * R + r) * D, K, D, begin, end, softcap,
                                     scores, sum, k);
        };
        int64_t r = 0;
        for (; r + 4 <= R; r += 4) heads.template operator()<4>(r);
        if (R - r == 3) heads.template operator()<3>(r);
        if (R - r == 2) heads.template operator()<2>(r);
        if (R - r == 1) heads.template operator()<1>(r);
      }
    }
  }
}

template <typename S>
void gate(const S* both, S* out, int64_t T, int64_t F, int tanh_gelu) {
#pragma omp parallel for schedule(static)
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

// One token a row by inverse CDF in two levels; see sampler.py, which says what it computes.
template <typename S>
void draw(const S* logits, const float* temperature, const double* uniform, int64_t* tokens,
          float* logprobs, int64_t B, int64_t V) {
  constexpr int64_t BLOCK = 256;
  const int64_t blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel
  {
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
}

}  // namespace

#define EXPORT(SUFFIX, S)                                                                          \
  extern "C" void add_norm_##SUFFIX(void* x, void* delta, void* weight, void* bias, void* out,     \
                                    int64_t T, int64_t C, float eps, int center, int offset) {     \
    add_norm((S*)x, (const S*)delta, (const S*)weight, (const S*)bias, (S*)out, T, C, eps, center, \
             offset);                                                                              \
  }                                                                                                \
  extern "C" void rotate_and_write_##SUFFIX(void* qkv, void* cos, void* sin, void* cache,          \
                                            void* slots, int64_t T, int64_t H, int64_t K,          \
                                            int64_t D, int64_t rotary) {                           \
    rotate_and_write((S*)qkv, (const S*)cos, (const S*)sin, (S*)cache, (const int64_t*)slots, T,   \
                     H, K, D, rotary);                                                             \
  }                                                                                                \
  extern "C" void attend_##SUFFIX(void* query, int64_t stride, void* cache, void* table,           \
                                  void* rows, void* positions, void* out, int64_t T, int64_t H,    \
                                  int64_t K, int64_t D, int64_t width, float scaling,              \
                                  int64_t window, float softcap) {                                 \
    auto call = D == 64 ? attend<S, 64> : D == 128 ? attend<S, 128> : attend<S, 0>;                \
    call((const S*)query, stride, (const S*)cache, (const int64_t*)table, (const int64_t*)rows,    \
         (const int64_t*)positions, (S*)out, T, H, K, D, width, scaling, window, softcap);         \
  }                                                                                                \
  extern "C" void gate_##SUFFIX(void* both, void* out, int64_t T, int64_t F, int tanh_gelu) {      \
    gate((const S*)both, (S*)out, T, F, tanh_gelu);                                                \
  }                                                                                                \
  extern "C" void draw_##SUFFIX(void* logits, void* temperature, void* uniform, void* tokens,      \
                                void* logprobs, int64_t B, int64_t V) {                            \
    draw((const S*)logits, (const float*)temperature, (const double*)uniform, (int64_t*)tokens,    \
         (float*)logprobs, B, V);                                                                  \
  }

EXPORT(float, float)
EXPORT(bf16, Half)
