// What is computed from logits: log-probabilities with their gradient, and samples.

#include "common.h"

namespace {

constexpr int64_t BLOCK = VOCABULARY_BLOCK;  // specs.py's

// log p(target) of each row of logits, and the entropy of p = softmax(logits / temperature). `norm`
// is the log of the sum, which the backward pass needs.
template <typename S>
void token_logprobs(const S* logits, const int64_t* targets, float* logprobs, float* entropy,
                    float* norm, int64_t M, int64_t V, float temperature) {
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
        weighted += e * std::max(x, -1e30f);  // for -inf, e is 0
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

// Replaces logits by their gradient: d log p(t) / dx = (onehot_t - p) / T and
// dH / dx = -p (log p + H) / T. `entropy_grad` may be null.
template <typename S>
void token_logprobs_backward(S* logits, const int64_t* targets, const float* entropy,
                             const float* norm, const float* logprob_grad,
                             const float* entropy_grad, int64_t M, int64_t V, float temperature) {
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

// Samples one token for each row, by inverse CDF in two levels (`Kernels.sample` in
// ../reference.py).
template <typename S>
void sample(const S* logits, const float* temperature, const double* uniform, int64_t* tokens,
            float* logprobs, int64_t B, int64_t V) {
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
      for (int64_t v = g * BLOCK; v < last; ++v) {  // if rounding passes the end, it is the last
        token = v;
        running += fast_exp(get(row + v) * factor - top);
        if (running > target) break;
      }
    }
    tokens[b] = token;
    logprobs[b] = float(double(get(row + token) * factor - top) - std::log(total));
  }
}

}  // namespace

EXPORT_BOTH(token_logprobs)
EXPORT_BOTH(token_logprobs_backward)
EXPORT_BOTH(sample)
