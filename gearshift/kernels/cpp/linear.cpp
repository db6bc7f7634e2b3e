// Matrix products: in fp32 by the weight itself, in bf16 by a prepacked copy.

#include "common.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

namespace {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
// out [M, N] = x [M, K] weight^T + bias, in float. The weight's number [n, k] lies at
// n * down + k * right.
//
// Lanes are rows of x, so that the sums of a row have one order, whatever rows are beside it. In a
// matrix library the order depends on the number of rows.
#ifdef __AVX512F__
constexpr int64_t OUTPUTS = 8, LANES = 3;  // sums (of 16 rows) that the registers hold
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

void linear(const float* x, const float* weight, const float* bias, float* out, int64_t M,
            int64_t N, int64_t K, int64_t down, int64_t right) {
  static thread_local std::vector<float> turned;  // [rows / 16, K, 16], filled up with zeros
  const int64_t some = std::max<int64_t>(1, (1 << 17) / K / (16 * LANES)) * 16 * LANES;
  for (int64_t m0 = 0; m0 < M; m0 += some) {
    const int64_t rows = std::min(some, M - m0), sixteens = (rows + 15) / 16;
    turned.assign(size_t(sixteens * 16 * K), 0.0f);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < K; ++k)
        turned[size_t((r / 16 * K + k) * 16 + r % 16)] = x[(m0 + r) * K + k];
#pragma omp for schedule(static) nowait
    for (int64_t strip = 0; strip < (N + OUTPUTS - 1) / OUTPUTS; ++strip) {
      const int64_t end = std::min(N, (strip + 1) * OUTPUTS);
      for (int64_t m = 0; m < sixteens; m += LANES) {
        const auto outputs = [&]<int64_t NB>(int64_t n) {
          const auto go = [&]<int64_t MB>() {
            rows_tile<NB, MB>(turned.data() + m * 16 * K, K, weight + n * down, down, right,
                              bias ? bias + n : nullptr, out + (m0 + m * 16) * N + n, N,
                              rows - m * 16);
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
void prepack(const Half* weight, Half* prepacked, int64_t N, int64_t K) {
#pragma omp for schedule(static)
  for (int64_t n0 = 0; n0 < N; n0 += 16) prepack_strip(weight, prepacked, N, K, n0);
}

#ifdef __AMX_BF16__
// Whether the system lets this process use the tile registers, which it must ask for.
bool may_use_tiles() {
  static const bool may = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return may;
}

// Sets up eight tiles of 16 rows of 64 bytes while it lives, and then restores what was set up
// before.
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

// `tile` of 16 MB rows by tile registers, K a multiple of 32. Each sum has one order, whatever rows
// are beside, so that samples do not depend on them. The sums of `before` are written meanwhile.
template <int64_t MB, int64_t NB>
inline void amx_tile(const Half* x, int64_t K, const Half* prepacked, const Half* ahead,
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
    _tile_loadd(6, prepacked + k * 16, 64);
    if (NB > 1) _tile_loadd(7, prepacked + K * 16 + k * 16, 64);
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

// `prepacked_linear` by tile registers.
void amx_prepacked_linear(const Half* x, const Half* prepacked, const Half* bias, Half* out,
                          int64_t M, int64_t N, int64_t K) {
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
      const Half* w = prepacked + n * K;
      // As in `prepacked_linear`: the next strip comes nearer, a half with each of the first
      // blocks.
      const int64_t halves = std::clamp<int64_t>(columns - 2 * (strip + 1), 0, 2);
      int64_t block = 0;
      const auto rows = [&]<int64_t MB>(int64_t m) {
        const Half* from = m < whole ? x + m * K : last.data();
        const Half* ahead = block < halves ? w + (2 + block) * 16 * K : nullptr;
        ++block;
        Sums &now = sums[turn], &before = sums[turn ^= 1];
        const bool wide = 2 * strip + 1 < columns;
        if (wide)
          amx_tile<MB, 2>(from, K, w, ahead, bias, N, now, before);
        else
          amx_tile<MB, 1>(from, K, w, ahead, bias, N, now, before);
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
void prepacked_linear(const Half* x, const Half* prepacked, const Half* bias, Half* out, int64_t M,
                      int64_t N, int64_t K) {
#ifdef __AMX_BF16__
  if (K % 32 == 0 && may_use_tiles()) return amx_prepacked_linear(x, prepacked, bias, out, M, N, K);
#endif
  constexpr int64_t BLOCK = 192;
  const int64_t columns = (N + 15) / 16, strips = (columns + COLUMNS - 1) / COLUMNS;
  for (int64_t m0 = 0; m0 < M; m0 += BLOCK) {
    const int64_t m1 = std::min(M, m0 + BLOCK);
#pragma omp for schedule(static) nowait
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t c = strip * COLUMNS, wide = std::min(COLUMNS, columns - c);
      const Half* w = prepacked + c * 16 * K;
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
#endif

}  // namespace

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
EXPORT(linear, float, linear)
#endif
#ifdef __AVX512BF16__
EXPORT(prepack, bf16, prepack)
EXPORT(prepacked_linear, bf16, prepacked_linear)
#endif
