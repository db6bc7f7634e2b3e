// Attention of new tokens over the blocks of the key-value cache.
//
// A tile is some tokens next to each other and one key head. Blocks that all tokens of a tile look
// at (the prompt of a group, the past of a prefill) are read once for all their queries, then each
// token reads its own blocks. The sums of a query have the same order either way.

#include "common.h"

namespace {

constexpr int64_t QUERIES = 12;  // in a tile, unless one token has more

// Calls `body` for the queries from r on, with their number as a constant.
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
void attend_size(const S* query, int64_t stride, const S* cache, const int64_t* block_tables,
                 const int64_t* seq_ids, const int64_t* positions, S* out, int64_t T, int64_t Q,
                 int64_t K, int64_t size, int64_t width, float scaling, int64_t window,
                 float softcap) {
  const int64_t D = FIXED ? FIXED : size, R = Q / K, M = std::max<int64_t>(1, QUERIES / R);
  const int64_t step = 2 * K * P * D;  // from block to block
  std::vector<float> floats;
  std::vector<S> numbers;
#pragma omp for collapse(2) schedule(dynamic, 1)
  for (int64_t t0 = 0; t0 < T; t0 += M) {
    for (int64_t k = 0; k < K; ++k) {
      const S* keys = cache + k * P * D;
      const S* values = keys + K * P * D;
      const int64_t n = std::min(M, T - t0);
      const auto blocks = [&](int64_t i) { return block_tables + seq_ids[t0 + i] * width; };
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
        S* to = out + ((t0 + i) * Q + k * R) * D;
#pragma omp simd
        for (int64_t j = 0; j < R * D; ++j) put(to + j, sums[i * R * D + j]);
      }
    }
  }
}

template <typename S>
void attend(const S* query, int64_t stride, const S* cache, const int64_t* block_tables,
            const int64_t* seq_ids, const int64_t* positions, S* out, int64_t T, int64_t Q,
            int64_t K, int64_t D, int64_t width, float scaling, int64_t window, float softcap) {
  const auto size = D == 64    ? attend_size<S, 64>
                    : D == 128 ? attend_size<S, 128>
                               : attend_size<S, 0>;
  size(query, stride, cache, block_tables, seq_ids, positions, out, T, Q, K, D, width, scaling,
       window, softcap);
}

}  // namespace

EXPORT_BOTH(attend)
