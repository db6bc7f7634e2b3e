// Training attention over packed sequences, bf16. A sequence's keys are the tokens of its
// ancestors, then its own up to the query (`window` > 0: the last so many). One thread takes a tree
// of sequences and a key head, so that gradients of shared keys are added up in one place.

#include "common.h"

#ifdef __AVX512BF16__

namespace {

struct Tree {
  const int64_t* cu;       // where each sequence starts, then the end
  const int64_t* parents;  // or -1; parents come first
  int64_t first, last;     // its sequences
};

// Lays out [K, N] rows of 16-bit numbers, `step` apart, as `prepack` lays out their transpose. Rows
// and columns beyond are zero.
inline void prepack_pairs(const Half* rows, int64_t step, int64_t K, int64_t N, Half* prepacked) {
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
      std::memcpy(prepacked + (n / 16 * pairs + k) * 32, &both, sizeof both);
    }
}

// out [M, N] = x [M, K] times the prepacked matrix; K even.
inline void small_product(const Half* x, const Half* prepacked, Half* out, int64_t M, int64_t N,
                          int64_t K) {
  const int64_t columns = (N + 15) / 16;
  for (int64_t c = 0; c < columns; c += COLUMNS) {
    const int64_t wide = std::min(COLUMNS, columns - c);
    const Half* w = prepacked + c * 16 * K;
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

// One sequence and key head, as both passes need it.
struct Piece {
  std::vector<int64_t> tokens;  // the L tokens of its keys
  int64_t S, L, wide;           // numbers of queries, of keys, and of keys rounded up
  std::vector<Half> q, k, v, scores, prepacked;

  // Reads queries [S * R, D], scaled, and keys and values [L, D]; computes scores [S * R, wide].
  void read(const Tree& tree, int64_t n, const Half* query, const Half* key, const Half* value,
            int64_t step, int64_t key_step, int64_t value_step, int64_t R, int64_t D,
            float scaling) {
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
    prepacked.resize(size_t(wide * std::max((D + 15) / 16 * 16, S * R + 1)));
    prepack_rows(k.data(), prepacked.data(), wide, D);
    small_product(q.data(), prepacked.data(), scores.data(), S * R, wide, D);
  }
  // The keys [from, to) that query s sees.
  int64_t to(int64_t s) const { return L - S + s + 1; }
  int64_t from(int64_t s, int64_t window) const {
    return window > 0 ? std::max<int64_t>(0, to(s) - window) : 0;
  }
};

void packed_attend(const Half* query, const Half* key, const Half* value, Half* out, float* norms,
                   const int64_t* cu, const int64_t* parents, const int64_t* trees, int64_t count,
                   int64_t step, int64_t key_step, int64_t value_step, int64_t Q, int64_t K,
                   int64_t D, float scaling, int64_t window) {
  const int64_t R = Q / K;
  Piece p;
  std::vector<float> row;
  std::vector<Half> seen;
#pragma omp for collapse(2) schedule(dynamic, 1)
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t k = 0; k < K; ++k) {
      const Tree tree{cu, parents, trees[g], trees[g + 1]};
      for (int64_t n = tree.first; n < tree.last; ++n) {
        p.read(tree, n, query + k * R * D, key + k * D, value + k * D, step, key_step, value_step,
               R, D, scaling);
        row.resize(size_t(p.wide));
        for (int64_t m = 0; m < p.S * R; ++m) {
          Half* at = p.scores.data() + m * p.wide;
          float* s = row.data();
          const int64_t from = p.from(m / R, window), to = p.to(m / R);
#pragma omp simd
          for (int64_t j = 0; j < p.wide; ++j) s[j] = get(at + j);
          norms[(cu[n] + m / R) * Q + k * R + m % R] = softmax(s, at, from, to, p.wide);
        }
        prepack_pairs(p.v.data(), D, p.wide, D, p.prepacked.data());
        seen.resize(size_t(p.S * R * D));
        small_product(p.scores.data(), p.prepacked.data(), seen.data(), p.S * R, D, p.wide);
        for (int64_t s = 0; s < p.S; ++s)
          std::copy_n(seen.data() + s * R * D, R * D, out + ((cu[n] + s) * Q + k * R) * D);
      }
    }
  }
}

// Gradients into `query_grad` [T, Q, D] and `key_grad`, `value_grad` [T, K, D].
void packed_attend_backward(const Half* query, const Half* key, const Half* value, const Half* out,
                            const Half* out_grad, const float* norms, Half* query_grad,
                            Half* key_grad, Half* value_grad, const int64_t* cu,
                            const int64_t* parents, const int64_t* trees, int64_t count,
                            int64_t step, int64_t key_step, int64_t value_step, int64_t Q,
                            int64_t K, int64_t D, float scaling, int64_t window) {
  const int64_t R = Q / K;
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
        p.read(tree, n, query + k * R * D, key + k * D, value + k * D, step, key_step, value_step,
               R, D, scaling);
        const int64_t M = p.S * R, even = M + M % 2;
        dout.resize(size_t(M * D));
        for (int64_t s = 0; s < p.S; ++s)
          std::copy_n(out_grad + ((cu[n] + s) * Q + k * R) * D, R * D, dout.data() + s * R * D);
        dscores.resize(size_t(M * p.wide));
        prepack_rows(p.v.data(), p.prepacked.data(), p.wide, D);
        small_product(dout.data(), p.prepacked.data(), dscores.data(), M, p.wide, D);
        for (int64_t m = 0; m < M; ++m) {
          const int64_t place = (cu[n] + m / R) * Q + k * R + m % R;
          float along = 0;
#pragma omp simd reduction(+ : along)
          for (int64_t d = 0; d < D; ++d)
            along += get(out + place * D + d) * get(dout.data() + m * D + d);
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
        prepack_pairs(p.k.data(), D, p.wide, D, p.prepacked.data());
        small_product(dscores.data(), p.prepacked.data(), product.data(), M, D, p.wide);
        for (int64_t s = 0; s < p.S; ++s) {
          Half* to = query_grad + ((cu[n] + s) * Q + k * R) * D;
#pragma omp simd
          for (int64_t i = 0; i < R * D; ++i)
            put(to + i, get(product.data() + s * R * D + i) * scaling);
        }
        // values: dO^T P, and keys: Q^T dS; both come out transposed, [D, wide]
        const auto add = [&](const Half* left, const Half* right, std::vector<float>& sums) {
          turned.assign(size_t(D * even), Half{0});
          for (int64_t m = 0; m < M; ++m)
            for (int64_t d = 0; d < D; ++d) turned[size_t(d * even + m)] = left[m * D + d];
          prepack_pairs(right, p.wide, M, p.wide, p.prepacked.data());
          small_product(turned.data(), p.prepacked.data(), product.data(), D, p.wide, even);
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

}  // namespace

EXPORT(packed_attend, bf16, packed_attend)
EXPORT(packed_attend_backward, bf16, packed_attend_backward)
#endif
