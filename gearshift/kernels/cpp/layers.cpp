// Norms, rotary embedding and gated activations, and their gradients.

#include "common.h"

namespace {

// The sum of term(0) ... term(H-1), in the order in which PyTorch's reduction on a CPU adds (four
// accumulators of eight lanes). So the norms are equal to PyTorch's to the bit; in bf16 one
// rounding that differs moves a log-prob by hundredths of a nat.
template <typename Term>
inline float ordered_sum(int64_t H, Term term) {
  constexpr int64_t LANES = 8, ROWS = 4, STEP = 16, LEVELS = 4;
  const int64_t vectors = H / LANES, size = vectors / ROWS;
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
  for (int64_t c = vectors * LANES; c < H; ++c) sum += term(c);
  for (int64_t l = 0; l < LANES; ++l) sum += level[0][l];
  return sum;
}

template <typename S>
void add_norm(const S* x, const S* delta, const S* weight, const S* bias, S* sum, S* out, int64_t T,
              int64_t H, float eps, int center, int offset) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* row = x + t * H;
    S* to = out + t * H;
    if (delta) {
      const S* d = delta + t * H;
      S* both = sum + t * H;
#pragma omp simd
      for (int64_t c = 0; c < H; ++c) put(both + c, get(row + c) + get(d + c));
      row = both;
    }
    const float mean =
        center ? ordered_sum(H, [&](int64_t c) { return get(row + c); }) / float(H) : 0.0f;
    const float square = ordered_sum(H, [&](int64_t c) {
      const float v = get(row + c) - mean;
      return v * v;
    });
    const float scale = 1.0f / std::sqrt(square / float(H) + eps);
    if (center) {
#pragma omp simd
      for (int64_t c = 0; c < H; ++c)
        put(to + c,
            (get(row + c) - mean) * scale * get(weight + c) + (bias ? get(bias + c) : 0.0f));
    } else if (offset) {
#pragma omp simd
      for (int64_t c = 0; c < H; ++c) put(to + c, get(row + c) * scale * (1.0f + get(weight + c)));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < H; ++c)
        put(to + c, rounded<S>(get(row + c) * scale) * get(weight + c));
    }
  }
}

// The backward pass of add_norm without a mean. `grad` [T, H] is the gradient of the sum x, and
// holds the gradient of the residual stream already. The gradient of the weight is added to
// `weight_grad`, which has a row of H floats for each thread.
template <typename S>
void add_norm_backward(const S* x, const S* weight, const S* out_grad, S* grad, float* weight_grad,
                       int64_t T, int64_t H, float eps, int offset) {
  float* own = weight_grad + omp_get_thread_num() * H;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* row = x + t * H;
    const S* dy = out_grad + t * H;
    S* dx = grad + t * H;
    float square = 0, along = 0;
#pragma omp simd reduction(+ : square, along)
    for (int64_t c = 0; c < H; ++c) {
      const float v = get(row + c), w = get(weight + c) + float(offset);
      square += v * v;
      along += v * w * get(dy + c);
    }
    const float scale = 1.0f / std::sqrt(square / float(H) + eps);
    const float back = along * scale * scale * scale / float(H);
#pragma omp simd
    for (int64_t c = 0; c < H; ++c) {
      const float v = get(row + c), d = get(dy + c), w = get(weight + c) + float(offset);
      put(dx + c, get(dx + c) + d * w * scale - v * back);
      own[c] += d * v * scale;
    }
  }
}

// Rotates the first Q heads of [T, heads, D] in place, by the angle or (`sign` -1) back.
template <typename S>
void apply_rotary(S* x, const S* cos, const S* sin, int64_t T, int64_t Q, int64_t heads, int64_t D,
                  int64_t rotary, float sign) {
  const int64_t half = rotary / 2;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const S* c = cos + t * rotary;
    const S* s = sin + t * rotary;
    for (int64_t h = 0; h < Q; ++h) {
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

template <typename S>
void apply_rotary_and_write(S* qkv, const S* cos, const S* sin, S* cache,
                            const int64_t* slot_mapping, int64_t T, int64_t Q, int64_t K, int64_t D,
                            int64_t rotary) {
  const int64_t half = rotary / 2;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    S* row = qkv + t * (Q + 2 * K) * D;
    const S* c = cos + t * rotary;
    const S* s = sin + t * rotary;
    for (int64_t h = 0; h < Q + K; ++h) {
      S* x = row + h * D;
#pragma omp simd
      for (int64_t d = 0; d < half; ++d) {
        const float a = get(x + d), b = get(x + half + d);
        put(x + d, rounded<S>(a * get(c + d)) - rounded<S>(b * get(s + d)));
        put(x + half + d, rounded<S>(b * get(c + half + d)) + rounded<S>(a * get(s + half + d)));
      }
    }
    const int64_t block = slot_mapping[t] / P, place = slot_mapping[t] % P;
    for (int64_t k = 0; k < K; ++k) {
      S* key = cache + (block * 2 * K + k) * P * D + 2 * place;
      S* value = cache + (block * 2 * K + K + k) * P * D + place / 2 * 2 * D + place % 2;
      for (int64_t d = 0; d < D; ++d) key[d / 2 * 2 * P + d % 2] = row[(Q + k) * D + d];
      for (int64_t d = 0; d < D; ++d) value[2 * d] = row[(Q + K + k) * D + d];
    }
  }
}

template <typename S>
void act_and_mul(const S* both, S* out, int64_t T, int64_t F, int tanh_gelu) {
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

// The backward pass of act_and_mul: gradients of the result [T, F] -> gradients of both halves [T,
// 2F].
template <typename S>
void act_and_mul_backward(const S* both, const S* out_grad, S* grad, int64_t T, int64_t F,
                          int tanh_gelu) {
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

}  // namespace

EXPORT_BOTH(add_norm)
EXPORT_BOTH(add_norm_backward)
EXPORT_BOTH(apply_rotary)
EXPORT_BOTH(apply_rotary_and_write)
EXPORT_BOTH(act_and_mul)
EXPORT_BOTH(act_and_mul_backward)
