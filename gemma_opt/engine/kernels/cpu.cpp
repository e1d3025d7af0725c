// One decode step of a Gemma 3 text model on the CPU: every row's next logits in one call.
//
// Weights are read once for all rows; activations are float32 whatever the weights are, so int8, int4 and float8 lose nothing
// but their own rounding. A decode step is bound by memory bandwidth, and the arithmetic here keeps ahead of it. Where a
// recipe has inputs quantized, products with int8 ones are made in integers.
//
// Each output number is summed by one thread in one order, whatever the number of rows and threads: a row's result never
// depends on its neighbours. Threads share a phase in small pieces, help each other, and meet at a spinning barrier.
// Every thread keeps its own copy of the residual stream: norms are cheaper computed twice than waited for.
//
// Threads come from the OpenMP runtime the process already has (torch's), so that no second pool competes for the cores.

#include <omp.h>
#include <sched.h>

#include <array>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "simd.hpp"

namespace {

using simd::Bf16;
using simd::Bytes;
using simd::E4m3;
using simd::Floats;
using simd::Ints;
using simd::kLanes;

constexpr int64_t kMaxRows = 16;            // rows of one call
constexpr int64_t kStrip = 8;               // output rows computed before the next rows of activations
constexpr int64_t kPieceBytes = 256 << 10;  // most weights a thread takes at a time: some microseconds of memory bandwidth
constexpr int64_t kPieces = 16;             // of a matrix for each thread, so that none waits long for the last
constexpr int64_t kAheadBytes = 8 << 10;    // weights are fetched so far before they are used
constexpr int64_t kPanelBytes = 128 << 10;  // weights that pass over many rows from the second cache
constexpr int64_t kPanel = 64;              // outputs whose int8 weights are packed together for many rows of int8 inputs
constexpr int64_t kPanelRows = 64;          // from which on packing pays
constexpr int64_t kRowGroup = 64;           // rows of activations a thread takes at a time where there are many
constexpr int64_t kBytes = 64;              // in one vector
constexpr int64_t kPairBlock = 32;          // columns whose even and odd members are separated for int4
constexpr int64_t kNearColumns = simd::kAccumulators < 16 ? 0 : 1024;  // columns of which 8 rows fit into the nearest cache
constexpr int kSpins = 300;  // some microseconds; then the core is offered to whoever else wants it

// The C interface: gemma_opt/engine/kernels/cpu.py mirrors these structures field by field.

enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3, kFp8 = 4 };
enum Grid : int32_t { kNoGrid = 0, kInt8Grid = 1, kFp8Grid = 2 };  // of the input

struct Matrix {  // rows of `in` weights, one after another
  const void* data;
  const void* scale;  // int8, fp8: float32 [out]; int4: bfloat16 [out, in / group]
  const uint8_t* zero;  // int4: [out, in / group], or null where every zero point is 8
  int64_t out, in, group;
  int32_t format, grid;
  float input_scale;  // of inputs on a grid; 0: every row has its own
  float unused;
};

struct Linear {  // y = last · (first · x); most have no `first`, and its `out` is 0
  Matrix last, first;
};

struct Layer {
  const float *input_norm, *query_norm, *key_norm, *post_attention_norm, *pre_mlp_norm, *post_mlp_norm;
  Linear query, key, value, o, gate, up, down;
  void *keys, *values;  // [slots, kv_heads, length, head_dim]
  int64_t length, sliding;
};

struct Model {
  int64_t hidden, heads, kv_heads, head_dim, intermediate, window, context, slots, layer_count, bf16_cache;
  float eps, attention_scale, embedding_scale, unused;
  const float *sliding_cos, *sliding_sin, *full_cos, *full_sin;  // [context, head_dim / 2]
  const float* final_norm;
  Matrix table;
  Linear head;
  const Layer* layers;
};

// Threads of one step

class Team {
 public:
  Team(int threads, int64_t phases) : threads_(threads), counters_(phases * threads) {}

  void meet() {
    const int generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins > kSpins) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  // How many pieces of one thread's share of a phase are already taken; one more is now.
  int64_t take(int64_t phase, int share) {
    return counters_[phase * threads_ + share].next.fetch_add(1, std::memory_order_relaxed);
  }

  int threads() const { return threads_; }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  const int threads_;
  std::vector<Counter> counters_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

// Dot products

inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// out[r][o] = Σ_k x[r][k] · w[o][k], for R rows of activations and O rows of weights, k in steps of 16, then one by one.
// stride: how far rows of x lie apart. ahead: how many bytes further on weights are fetched; 0 where another pass did so.
template <class T, int R, int O>
inline void dots(const T* w, const float* x, int64_t n, int64_t stride, int64_t ahead, float (&out)[R][O]) {
  Floats sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r][o] = simd::splat(0.0f);
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    if (ahead && k % kLine == 0)
      for (int o = 0; o < O; ++o) fetch(reinterpret_cast<const char*>(w + o * n + k) + ahead);
    Floats weights[O];
    for (int o = 0; o < O; ++o) weights[o] = simd::load(w + o * n + k);
    for (int r = 0; r < R; ++r) {
      const Floats inputs = simd::load(x + r * stride + k);
      for (int o = 0; o < O; ++o) sums[r][o] = simd::fma(inputs, weights[o], sums[r][o]);
    }
  }
  simd::sums<R * O>(&sums[0][0], &out[0][0]);
  for (; k < n; ++k)
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < O; ++o) out[r][o] += x[r * stride + k] * simd::widen(w[o * n + k]);
}

// A row of activations as a matrix wants it: `body` floats' room of values, `sums` of those of neighbours, and the scale.
// Integers where int8 meets int8 or int4; for a matrix of floats without a grid the row as it is.
struct Shape {
  int64_t body, sums, scale;

  explicit Shape(const Matrix& m) : body(m.in), sums(0), scale(m.grid ? kLanes : 0) {
    if (integer(m)) body = (row_bytes_of(m) + kBytes - 1) / kBytes * kBytes * (m.format == kInt4 ? 2 : 1) / 4;
    else if (changed(m)) body = (m.in + kLanes - 1) / kLanes * kLanes;
    if (m.format == kInt4) sums = (m.in / m.group + kLanes - 1) / kLanes * kLanes;
    else if (integer(m)) sums = kLanes;
  }

  int64_t stride() const { return body + sums + scale; }
  static bool integer(const Matrix& m) { return m.grid == kInt8Grid && (m.format == kInt8 || m.format == kInt4); }
  static bool changed(const Matrix& m) { return m.grid || m.format == kInt4; }
  static int64_t row_bytes_of(const Matrix& m) {
    return m.format == kFloat32 ? 4 * m.in : m.format == kBfloat16 ? 2 * m.in : m.format == kInt4 ? m.in / 2 : m.in;
  }
};

// What zero points add to 4-bit products that were counted from `base`: Σ_groups (base − zero) · scale · Σ x. Sixteen groups at
// a time, the last sixteen overlapping the ones before, whose sums are zero there. group_sums: of the first row of x.
template <int R, int O>
inline void shift(const Matrix& m, int64_t first, const float* group_sums, int64_t stride, float base, Floats (&sums)[R][O]) {
  const int64_t groups = m.in / m.group;
  const Bf16* scale = static_cast<const Bf16*>(m.scale) + first * groups;
  const uint8_t* zero = m.zero ? m.zero + first * groups : nullptr;
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
    for (int64_t at = 0; at < groups; at += kLanes) {
      const int64_t g = o * groups + std::min(at, groups - kLanes);
      const Floats weights = (simd::splat(base) - (zero ? simd::load(zero + g) : simd::splat(8.0f))) * simd::load(scale + g);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][o] = simd::fma(weights, simd::load(group_sums + r * stride + at), sums[r][o]);
    }
}

// The same where there are fewer than sixteen groups, on the finished numbers.
template <int R, int O>
inline void shift_few(const Matrix& m, int64_t first, const float* group_sums, int64_t stride, float base, float (&out)[R][O]) {
  const int64_t groups = m.in / m.group;
  for (int o = 0; o < O; ++o)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (first + o) * groups + g;
      const float zero = m.zero ? simd::widen(m.zero[at]) : 8.0f;
      const float weight = (base - zero) * simd::widen(static_cast<const Bf16*>(m.scale)[at]);
      for (int r = 0; r < R; ++r) out[r][o] += weight * group_sums[r * stride + g];
    }
}

// The same for 4-bit weights. x: prepared. Weights count from zero point 8; `shift` adds what other zero points change.
template <int R, int O>
inline void dots_int4(const Matrix& m, int64_t first, const float* x, int64_t ahead, float (&out)[R][O]) {
  const Shape shape(m);
  const int64_t groups = m.in / m.group, row_bytes = m.in / 2, group_bytes = m.group / 2, stride = shape.stride();
  const uint8_t* data = static_cast<const uint8_t*>(m.data) + first * row_bytes;
  const Bf16* scale = static_cast<const Bf16*>(m.scale) + first * groups;
  Floats sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r][o] = simd::splat(0.0f);
  for (int64_t byte = 0; byte < row_bytes; byte += kLanes) {
    const int64_t g = byte / group_bytes;
    const float* inputs = x + 2 * byte;
    if (ahead && byte % 64 == 0)
      for (int o = 0; o < O; ++o) fetch(data + o * row_bytes + byte + ahead);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const simd::Nibbles values(scale[o * groups + g]);
      Floats even, odd;
      values.expand(data + o * row_bytes + byte, even, odd);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r][o] = simd::fma(simd::load(inputs + r * stride), even, sums[r][o]);
        sums[r][o] = simd::fma(simd::load(inputs + r * stride + kLanes), odd, sums[r][o]);
      }
    }
  }
  if (m.zero && groups >= kLanes) shift<R, O>(m, first, x + shape.body, stride, 8.0f, sums);
  simd::sums<R * O>(&sums[0][0], &out[0][0]);
  if (m.zero && groups < kLanes) shift_few<R, O>(m, first, x + shape.body, stride, 8.0f, out);
}

// Products of 64 neighbours, of which `left` are there.
template <int R, int O>
inline void add_int8(const int8_t* w, int64_t row, const float* x, int64_t stride, int64_t k, int64_t left,
                     Ints (&sums)[R][O]) {
  Bytes weights[O];
  for (int o = 0; o < O; ++o) {
    const int8_t* from = w + o * row + k;
    weights[o] = left == kBytes ? simd::load_bytes(from) : simd::load_bytes(from, left);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Bytes inputs = simd::load_bytes(reinterpret_cast<const int8_t*>(x + r * stride) + k);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) sums[r][o] = simd::dot_signed(weights[o], inputs, sums[r][o]);
  }
}

// int8 weights, int8 x, prepared; exact.
template <int R, int O>
inline void dots_int8_grid(const Matrix& m, int64_t first, const float* x, int64_t ahead, float (&out)[R][O]) {
  const Shape shape(m);
  const int8_t* data = static_cast<const int8_t*>(m.data) + first * m.in;
  Ints sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r][o] = simd::ints(0);
  int64_t k = 0;
  for (; k + kBytes <= m.in; k += kBytes) {
    if (ahead) {
      for (int o = 0; o < O; ++o) fetch(data + o * m.in + k + ahead);
      if (R == 1) simd::wait_for_loads();
    }
    add_int8<R, O>(data, m.in, x, shape.stride(), k, kBytes, sums);
  }
  if (k < m.in) add_int8<R, O>(data, m.in, x, shape.stride(), k, m.in - k, sums);
  int32_t whole[R][O];
  simd::sums<R * O>(&sums[0][0], &whole[0][0]);
  for (int r = 0; r < R; ++r) {
    int32_t too_much;  // what the instruction added for the sign it does not know
    std::memcpy(&too_much, x + r * shape.stride() + shape.body, sizeof too_much);
    for (int o = 0; o < O; ++o) out[r][o] = static_cast<float>(whole[r][o] - too_much);
  }
}

// 4-bit weights, int8 x, prepared: sixteen sums of eight products, each exact, are scaled at a time.
template <int R, int O>
inline void dots_int4_grid(const Matrix& m, int64_t first, const float* x, int64_t ahead, float (&out)[R][O]) {
  const Shape shape(m);
  const int64_t groups = m.in / m.group, row_bytes = m.in / 2, quarters = m.group / 32, stride = shape.stride();
  const uint8_t* data = static_cast<const uint8_t*>(m.data) + first * row_bytes;
  const uint16_t* scale = static_cast<const uint16_t*>(m.scale) + first * groups;
  Floats sums[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r][o] = simd::splat(0.0f);
  for (int64_t byte = 0; byte < row_bytes; byte += kBytes) {
    const int8_t* inputs = reinterpret_cast<const int8_t*>(x) + 2 * byte;
    if (ahead)
      for (int o = 0; o < O; ++o) fetch(data + o * row_bytes + byte + ahead);
    const bool whole = byte + kBytes <= row_bytes;
    int64_t g[4];  // the groups of this block's quarters; past the row's end any group, whose weights count as zeros
    for (int64_t i = 0; i < 4; ++i) g[i] = quarters == 1 ? byte / 16 + i : (byte / 16 + i) / quarters;
    for (int64_t i = 0; i < 4 && !whole; ++i) g[i] = std::min(g[i], groups - 1);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const uint16_t* from_scale = scale + o * groups;
      uint64_t four;
      if (quarters == 1 && whole) {
        std::memcpy(&four, from_scale + g[0], sizeof four);
      } else {
        four = uint64_t{from_scale[g[0]]} | uint64_t{from_scale[g[1]]} << 16 | uint64_t{from_scale[g[2]]} << 32 |
               uint64_t{from_scale[g[3]]} << 48;
      }
      const Floats scales = simd::quarters(four);
      const Bytes both = simd::load_bytes(data + o * row_bytes + byte, row_bytes - byte);
      const Bytes even = simd::low_nibbles(both), odd = simd::high_nibbles(both);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int8_t* from = inputs + 4 * r * stride;
        const Ints sum = simd::dot_unsigned(even, simd::load_bytes(from), simd::ints(0));
        const Floats eight = simd::floats(simd::dot_unsigned(odd, simd::load_bytes(from + kBytes), sum));
        sums[r][o] = simd::fma(eight, scales, sums[r][o]);
      }
    }
  }
  if (groups >= kLanes) shift<R, O>(m, first, x + shape.body, stride, 0.0f, sums);
  simd::sums<R * O>(&sums[0][0], &out[0][0]);
  if (groups < kLanes) shift_few<R, O>(m, first, x + shape.body, stride, 0.0f, out);
}

template <int R, int O>
inline void dots_of(const Matrix& m, int64_t first, const float* x, int64_t ahead, float (&out)[R][O]) {
  const int64_t at = first * m.in, stride = Shape(m).stride();
  if (Shape::integer(m))
    return m.format == kInt8 ? dots_int8_grid<R, O>(m, first, x, ahead, out) : dots_int4_grid<R, O>(m, first, x, ahead, out);
  switch (m.format) {
    case kFloat32: return dots<float, R, O>(static_cast<const float*>(m.data) + at, x, m.in, stride, ahead, out);
    case kBfloat16: return dots<Bf16, R, O>(static_cast<const Bf16*>(m.data) + at, x, m.in, stride, ahead, out);
    case kInt8: return dots<int8_t, R, O>(static_cast<const int8_t*>(m.data) + at, x, m.in, stride, ahead, out);
    case kFp8: return dots<E4m3, R, O>(static_cast<const E4m3*>(m.data) + at, x, m.in, stride, ahead, out);
    default: return dots_int4<R, O>(m, first, x, ahead, out);
  }
}

// R rows of activations times output rows [first, last), O at a time. y: row stride `stride`.
template <int R, int O>
void strip(const Matrix& m, int64_t first, int64_t last, const float* x, float* y, int64_t stride, int64_t ahead) {
  const float* scale = m.format == kInt8 || m.format == kFp8 ? static_cast<const float*>(m.scale) : nullptr;
  const int64_t input_stride = Shape(m).stride();
  int64_t o = first;
  for (; o + O <= last; o += O) {
    float out[R][O];
    dots_of<R, O>(m, o, x, ahead, out);
    for (int r = 0; r < R; ++r) {
      const float input_scale = m.grid ? x[(r + 1) * input_stride - kLanes] : 1.0f;
      for (int i = 0; i < O; ++i) y[r * stride + o + i] = (scale ? out[r][i] * scale[o + i] : out[r][i]) * input_scale;
    }
  }
  if constexpr (O > 1) {
    if (o < last) strip<R, 1>(m, o, last, x, y, stride, ahead);
  }
}

// Columns of which 8 rows of activations fit into the nearest cache.
int64_t near_columns(const Matrix& m) { return Shape::integer(m) ? 4 * kNearColumns : kNearColumns; }

// y[r][o] = weights[o] · x[r] for output rows [first, last). x: rows, prepared; y: row stride `stride`.
void multiply(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t rows, float* y, int64_t stride) {
  const int64_t strip_bytes = kStrip * Shape::row_bytes_of(m);
  const int64_t ahead = (kAheadBytes + strip_bytes - 1) / strip_bytes * strip_bytes;
  for (int64_t o = first; o < last; o += kStrip) {
    const int64_t end = std::min(o + kStrip, last);
    for (int64_t r = 0; r < rows;) {
      const float* from = x + r * Shape(m).stride();
      float* to = y + r * stride;
      const int64_t fetched = r ? 0 : ahead;
      const int64_t left = rows - r;
      if (left >= 8 && m.in <= near_columns(m)) {
        strip<8, std::max(1, simd::kAccumulators / 8)>(m, o, end, from, to, stride, fetched), r += 8;
      } else if (left >= 4) {
        strip<4, simd::kAccumulators / 4>(m, o, end, from, to, stride, fetched), r += 4;
      } else if (left >= 2) {
        strip<2, simd::kAccumulators / 4>(m, o, end, from, to, stride, fetched), r += 2;
      } else {
        strip<1, simd::kAccumulators / 2>(m, o, end, from, to, stride, fetched), r += 1;
      }
    }
  }
}

// Output rows of about that many bytes.
int64_t rows_of(const Matrix& m, int64_t bytes) { return std::max(kStrip, bytes / Shape::row_bytes_of(m) / kStrip * kStrip); }

// Output rows a thread takes at a time from `width` rows like those of `m`.
int64_t grain_of(const Matrix& m, int64_t width, int64_t threads) {
  return rows_of(m, std::min(width * Shape::row_bytes_of(m) / (threads * kPieces), kPieceBytes));
}

// int8 weights of some outputs in the order that many rows of int8 inputs meet them: four neighbours of each of sixteen
// outputs in a vector, so that lanes need not be added up at the end. Zeros where the matrix ends.
int64_t panel_bytes(const Matrix& m) { return kPanel * ((m.in + 3) / 4 * 4); }

void pack_panel(const Matrix& m, int64_t first, int8_t* panel) {
  std::fill_n(panel, panel_bytes(m), int8_t{0});
  const int64_t steps = (m.in + 3) / 4;
  for (int64_t o = 0; o < std::min(kPanel, m.out - first); ++o) {
    const int8_t* row = static_cast<const int8_t*>(m.data) + (first + o) * m.in;
    int8_t* to = panel + (o / kLanes * steps * kLanes + o % kLanes) * 4;
    for (int64_t step = 0; step < steps; ++step)
      std::copy_n(row + 4 * step, std::min<int64_t>(4, m.in - 4 * step), to + step * kBytes);
  }
}

// R prepared rows times a packed panel: the bits of `dots_int8_grid`.
template <int R>
void multiply_panel(const Matrix& m, int64_t first, const int8_t* panel, const float* x, float* y) {
  const Shape shape(m);
  const int64_t steps = (m.in + 3) / 4, outputs = std::min(kPanel, m.out - first);
  for (int64_t o = 0; o < outputs; o += 2 * kLanes) {
    Ints sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t too_much;
      std::memcpy(&too_much, x + r * shape.stride() + shape.body, sizeof too_much);
      sums[r][0] = sums[r][1] = simd::ints(-too_much);
    }
    const int8_t* weights = panel + o * steps * 4;
    for (int64_t step = 0; step < steps; ++step) {
      const Bytes low = simd::load_bytes(weights + step * kBytes), high = simd::load_bytes(weights + (steps + step) * kBytes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Bytes inputs = simd::splat4(reinterpret_cast<const int8_t*>(x + r * shape.stride()) + 4 * step);
        sums[r][0] = simd::dot_signed(low, inputs, sums[r][0]);
        sums[r][1] = simd::dot_signed(high, inputs, sums[r][1]);
      }
    }
    const float* scale = static_cast<const float*>(m.scale) + first + o;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float whole[2 * kLanes];
      simd::store(whole, simd::floats(sums[r][0]));
      simd::store(whole + kLanes, simd::floats(sums[r][1]));
      const float input_scale = x[(r + 1) * shape.stride() - kLanes];
      float* to = y + r * m.out + first + o;
      for (int64_t i = 0; i < std::min(2 * kLanes, outputs - o); ++i) to[i] = whole[i] * scale[i] * input_scale;
    }
  }
}

// Elementwise

// out = x / RMS(x) · factor
void rms_norm(const float* x, const float* factor, int64_t n, float eps, float* out) {
  Floats squares = simd::splat(0.0f);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) squares = simd::fma(simd::load(x + k), simd::load(x + k), squares);
  float total = simd::sum(squares);
  for (int64_t tail = k; tail < n; ++tail) total += x[tail] * x[tail];
  const float inverse = 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * factor[i];
}

// Rotary embedding of one head, in place.
void rotate(float* x, const float* cos, const float* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

// out = gelu(gate) · up, gelu in its tanh form: g · (1 + tanh u) / 2 = g / (1 + e^(−2u)).
void gated_gelu(const float* gate, const float* up, int64_t n, float* out) {
  constexpr float kLinear = -2.0f * 0.7978845608028654f, kCubic = kLinear * 0.044715f;
  auto block = [](const float* g_, const float* u_, float* out_) {
    const Floats g = simd::load(g_), one = simd::splat(1.0f);
    const Floats exponent = g * simd::fma(g * g, simd::splat(kCubic), simd::splat(kLinear));
    simd::store(out_, g / (one + simd::exp(exponent)) * simd::load(u_));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) block(gate + i, up + i, out + i);
  if (i < n) {
    float g[kLanes] = {}, u[kLanes] = {}, result[kLanes];
    std::copy(gate + i, gate + n, g);
    std::copy(up + i, up + n, u);
    block(g, u, result);
    std::copy(result, result + (n - i), out + i);
  }
}

// The nearest e4m3 value, ties to even; |x| ≤ 448.
inline float to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u;  // three bits of fraction
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  constexpr float kLeast = 0x1p-6f, kSteps = 0x1p9f;  // below, steps are of one size
  return std::fabs(x) < kLeast ? std::nearbyint(x * kSteps) / kSteps : rounded;
}

// out = x / scale on a grid; returns the scale. `quantize_input` in Python does the same. A NaN in x, which no integer can be,
// makes the scale one, and so all results.
float to_grid(const Matrix& m, const float* x, float* out) {
  const float limit = m.grid == kInt8Grid ? 127.0f : 448.0f;
  float scale = m.input_scale;
  bool broken = false;
  for (int64_t k = 0; k < m.in; ++k) broken |= std::isnan(x[k]);
  if (broken) {
    std::fill_n(out, m.in, 0.0f);
    return std::nanf("");
  }
  if (scale == 0.0f) {
    float greatest = 1e-12f;
    for (int64_t k = 0; k < m.in; ++k) greatest = std::max(greatest, std::fabs(x[k]));
    scale = greatest / limit;
  }
  for (int64_t k = 0; k < m.in; ++k) {
    const float step = std::min(std::max(x[k] / scale, -limit), limit);
    out[k] = m.grid == kInt8Grid ? std::nearbyint(step) : to_e4m3(step);
  }
  return scale;
}

// One row of activations as a matrix wants it; see Shape. For int4 columns are in blocks of 32 (of 128 where they are
// integers), first the even ones, then the odd ones, as bytes of two weights hold them; behind them the sum of every group,
// the last sixteen ending with the last. room: for `in` floats.
void prepare(const Matrix& m, const float* x, float* out, float* room) {
  const Shape shape(m);
  if (m.grid) {
    out[shape.stride() - kLanes] = to_grid(m, x, room);
    x = room;
  }
  if (Shape::integer(m)) {
    int8_t* bytes = reinterpret_cast<int8_t*>(out);
    std::fill_n(bytes, 4 * shape.body, 0);
    int32_t sum = 0;
    for (int64_t k = 0; k < m.in; ++k) {
      const int64_t pair = k / 2, at = m.format == kInt8 ? k : pair / kBytes * 2 * kBytes + k % 2 * kBytes + pair % kBytes;
      bytes[at] = static_cast<int8_t>(x[k]);
      sum += static_cast<int32_t>(x[k]);
    }
    sum *= simd::kOffset;
    if (m.format == kInt8) std::memcpy(out + shape.body, &sum, sizeof sum);
  } else if (m.format == kInt4) {
    for (int64_t block = 0; block < m.in; block += kPairBlock)
      for (int64_t i = 0; i < kLanes; ++i) {
        out[block + i] = x[block + 2 * i];
        out[block + kLanes + i] = x[block + 2 * i + 1];
      }
  } else {
    std::copy(x, x + m.in, out);
  }
  if (m.format != kInt4 || !(m.zero || Shape::integer(m))) return;
  const int64_t groups = m.in / m.group, overlap = groups < kLanes ? 0 : (kLanes - groups % kLanes) % kLanes;
  float* sums = out + shape.body;
  for (int64_t g = 0; g < groups; ++g) {
    Floats sum = simd::splat(0.0f);
    for (int64_t k = g * m.group; k < (g + 1) * m.group; k += kLanes) sum = sum + simd::load(x + k);
    sums[g < groups / kLanes * kLanes ? g : g + overlap] = simd::sum(sum);
  }
  if (overlap) std::fill_n(sums + groups / kLanes * kLanes, overlap, 0.0f);
}

// Whether one row prepared for `a` is one prepared for `b`.
bool alike(const Matrix& a, const Matrix& b) {
  if (a.format == kInt4 || b.format == kInt4)
    if (a.format != b.format || a.group != b.group || !a.zero != !b.zero) return false;
  return a.in == b.in && a.grid == b.grid && a.input_scale == b.input_scale && Shape::integer(a) == Shape::integer(b);
}

// Attention

struct Span {  // indices of a slot's ring, in order of position
  int64_t begin, end;
};

// scores[h][i] = query[h] · key of the i-th position, for H heads.
template <class T, int H>
void score(const float* query, const T* keys, Span span, int64_t head_dim, float scale, float* scores, int64_t stride) {
  for (int64_t p = span.begin; p < span.end; ++p) {
    Floats sums[H];
    for (int h = 0; h < H; ++h) sums[h] = simd::splat(0.0f);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const Floats key = simd::load(keys + p * head_dim + d);
      for (int h = 0; h < H; ++h) sums[h] = simd::fma(simd::load(query + h * head_dim + d), key, sums[h]);
    }
    float dots[H];
    simd::sums<H>(sums, dots);
    for (int h = 0; h < H; ++h) scores[h * stride + (p - span.begin)] = dots[h] * scale;
  }
}

// Scores → e^(score − maximum); returns the inverse of their sum.
float soften(float* scores, int64_t n) {
  float highest = scores[0];
  for (int64_t i = 1; i < n; ++i) highest = std::max(highest, scores[i]);
  Floats total = simd::splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats weight = simd::exp(simd::load(scores + i) - simd::splat(highest));
    simd::store(scores + i, weight);
    total = total + weight;
  }
  float rest = 0.0f;
  if (i < n) {
    float tail[kLanes] = {};
    std::copy(scores + i, scores + n, tail);
    simd::store(tail, simd::exp(simd::load(tail) - simd::splat(highest)));
    std::copy(tail, tail + (n - i), scores + i);
    for (int64_t k = i; k < n; ++k) rest += scores[k];
  }
  return 1.0f / (simd::sum(total) + rest);
}

// out[h] += Σ_i weights[h][i] · value of the i-th position, for H heads.
template <class T, int H>
void blend(const float* weights, int64_t stride, const T* values, Span span, int64_t head_dim, float* out) {
  constexpr int kBlocks = 4;  // vectors of one head held in registers
  for (int64_t d = 0; d < head_dim; d += kBlocks * kLanes) {
    const int blocks = static_cast<int>(std::min<int64_t>(kBlocks, (head_dim - d) / kLanes));
    Floats sums[H][kBlocks];
    for (int h = 0; h < H; ++h)
      for (int b = 0; b < blocks; ++b) sums[h][b] = simd::load(out + h * head_dim + d + b * kLanes);
    for (int64_t p = span.begin; p < span.end; ++p) {
      const T* value = values + p * head_dim + d;
      for (int h = 0; h < H; ++h) {
        const Floats weight = simd::splat(weights[h * stride + (p - span.begin)]);
        for (int b = 0; b < blocks; ++b) sums[h][b] = simd::fma(weight, simd::load(value + b * kLanes), sums[h][b]);
      }
    }
    for (int h = 0; h < H; ++h)
      for (int b = 0; b < blocks; ++b) simd::store(out + h * head_dim + d + b * kLanes, sums[h][b]);
  }
}

// Attention of H query heads that share keys and values. scores: room for H × stride floats; out: [H, head_dim].
template <class T, int H>
void attend(const float* query, const T* keys, const T* values, const Span (&spans)[2], int64_t head_dim, float scale,
            float* scores, int64_t stride, float* out) {
  const int64_t first = spans[0].end - spans[0].begin, count = first + spans[1].end - spans[1].begin;
  score<T, H>(query, keys, spans[0], head_dim, scale, scores, stride);
  score<T, H>(query, keys, spans[1], head_dim, scale, scores + first, stride);
  float inverse[H];
  for (int h = 0; h < H; ++h) inverse[h] = soften(scores + h * stride, count);
  std::fill(out, out + H * head_dim, 0.0f);
  blend<T, H>(scores, stride, values, spans[0], head_dim, out);
  blend<T, H>(scores + first, stride, values, spans[1], head_dim, out);
  for (int h = 0; h < H; ++h)
    for (int64_t d = 0; d < head_dim; ++d) out[h * head_dim + d] *= inverse[h];
}

// Attention of R rows of a chunk that share a KV head, each to keys [begin, end) of its own. query, out: [R, head_dim].
template <int R>
void attend_rows(const float* query, const float* keys, const float* values, const int64_t* begin, const int64_t* end,
                 int64_t head_dim, float scale, float* scores, int64_t stride, float* out) {
  const int64_t first = *std::min_element(begin, begin + R), last = *std::max_element(end, end + R);
  constexpr int kKeys = std::max(1, simd::kAccumulators / 4);
  int64_t p = first;
  for (; p + kKeys <= last; p += kKeys) {
    float dot[R][kKeys];
    dots<float, R, kKeys>(keys + p * head_dim, query, head_dim, head_dim, 0, dot);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kKeys; ++i) scores[r * stride + p - first + i] = dot[r][i] * scale;
  }
  for (; p < last; ++p) {
    float dot[R][1];
    dots<float, R, 1>(keys + p * head_dim, query, head_dim, head_dim, 0, dot);
    for (int r = 0; r < R; ++r) scores[r * stride + p - first] = dot[r][0] * scale;
  }
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    float* row = scores + r * stride;
    std::fill(row, row + (begin[r] - first), 0.0f);
    std::fill(row + (end[r] - first), row + (last - first), 0.0f);
    inverse[r] = soften(row + (begin[r] - first), end[r] - begin[r]);
  }
  std::fill(out, out + R * head_dim, 0.0f);
  blend<float, R>(scores, stride, values, {first, last}, head_dim, out);
  for (int r = 0; r < R; ++r)
    for (int64_t d = 0; d < head_dim; ++d) out[r * head_dim + d] *= inverse[r];
}

// One thread's part of a step

struct Rows {
  const int64_t *tokens, *slots, *positions;
  int64_t count;
};

// Vectors straddle no cache line: a load across two takes twice as long.
struct Buffer {
  explicit Buffer(int64_t size) : data_(static_cast<float*>(::operator new(size * sizeof(float), kLine))) {}
  float* get() const { return data_.get(); }
  float& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<float[], Free> data_;
};

constexpr int kParts = 3;  // matrices that are multiplied with the same input: query, key and value

struct Widest {  // floats that the widest row takes: of an input, prepared, and between the two matrices of a linear
  int64_t input = 0, prepared = 0, between = 0;

  explicit Widest(const Model& m) {
    take(m.head);
    for (int64_t i = 0; i < m.layer_count; ++i) {
      const Layer& l = m.layers[i];
      for (const Linear* linear : {&l.query, &l.key, &l.value, &l.o, &l.gate, &l.up, &l.down}) take(*linear);
    }
  }

 private:
  void take(const Linear& linear) {
    for (const Matrix* m : {&linear.last, &linear.first}) {
      if (!m->out) continue;
      input = std::max(input, m->in);
      prepared = std::max(prepared, Shape(*m).stride());
    }
    between = std::max(between, linear.first.out);
  }
};

struct Shared {  // activations that threads hand to each other, [rows, width] each
  Buffer qkv, attended, mixed, gated, down, between[kParts];
  Shared(const Model& m, const Widest& widest)
      : qkv(kMaxRows * (m.heads + 2 * m.kv_heads) * m.head_dim), attended(kMaxRows * m.heads * m.head_dim),
        mixed(kMaxRows * m.hidden), gated(kMaxRows * m.intermediate), down(kMaxRows * m.hidden),
        between{Buffer(kMaxRows * widest.between), Buffer(kMaxRows * widest.between), Buffer(kMaxRows * widest.between)} {}
};

struct Private {
  Buffer residual, normed, room, prepared[kParts], gate, up, scores;
  Private(const Model& m, const Widest& widest)
      : residual(kMaxRows * m.hidden), normed(kMaxRows * m.hidden), room(widest.input),
        prepared{Buffer(kMaxRows * widest.prepared), Buffer(kMaxRows * widest.prepared), Buffer(kMaxRows * widest.prepared)},
        gate(kMaxRows * m.intermediate), up(kMaxRows * m.intermediate), scores(m.heads / m.kv_heads * m.context) {}
};

class Worker {
 public:
  Worker(const Model& m, const Rows& rows, Shared& shared, Private& mine, Team& team, int id, float* logits)
      : m_(m), rows_(rows), shared_(shared), my_(mine), team_(team), id_(id), logits_(logits) {}

  void run() {
    for (int64_t r = 0; r < rows_.count; ++r) embed(rows_.tokens[r], &my_.residual[r * m_.hidden]);
    for (int64_t i = 0; i < m_.layer_count; ++i) {
      if (m_.bf16_cache) {
        layer<Bf16>(m_.layers[i]);
      } else {
        layer<float>(m_.layers[i]);
      }
    }
    norm(m_.final_norm);
    linear<1>({&m_.head}, my_.normed.get(), logits_);
  }

 private:
  template <class T>
  void layer(const Layer& l) {
    const int64_t qkv_width = (m_.heads + 2 * m_.kv_heads) * m_.head_dim;
    norm(l.input_norm);
    linear<3>({&l.query, &l.key, &l.value}, my_.normed.get(), shared_.qkv.get());
    share(rows_.count * m_.kv_heads, 1, [&](int64_t item, int64_t) { append<T>(l, item / m_.kv_heads, item % m_.kv_heads); });
    attention<T>(l, qkv_width);
    linear<1>({&l.o}, shared_.attended.get(), shared_.mixed.get());
    add(shared_.mixed.get(), l.post_attention_norm);
    norm(l.pre_mlp_norm);
    mlp(l);
    linear<1>({&l.down}, shared_.gated.get(), shared_.down.get());
    add(shared_.down.get(), l.post_mlp_norm);
  }

  // A phase: items [0, total) in pieces of `grain`. Every thread has a share of neighbouring pieces, so that it reads memory
  // in one stream; one that is through helps the next. All leave the phase together.
  template <class F>
  void share(int64_t total, int64_t grain, F work) {
    const int64_t phase = phase_++, pieces = (total + grain - 1) / grain, threads = team_.threads();
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t whose = (id_ + i) % threads, first = pieces * whose / threads, last = pieces * (whose + 1) / threads;
      for (int64_t piece; (piece = first + team_.take(phase, static_cast<int>(whose))) < last;)
        work(piece * grain, std::min((piece + 1) * grain, total));
    }
    team_.meet();
  }

  void embed(int64_t token, float* out) const {
    const Matrix& t = m_.table;
    const int64_t at = token * t.in;
    const float scale = t.format == kInt8 ? static_cast<const float*>(t.scale)[token] : 1.0f;
    for (int64_t i = 0; i < t.in; ++i) {
      const float value = t.format == kFloat32 ? static_cast<const float*>(t.data)[at + i]
                          : t.format == kInt8  ? simd::widen(static_cast<const int8_t*>(t.data)[at + i])
                                               : simd::widen(static_cast<const Bf16*>(t.data)[at + i]);
      out[i] = value * scale * m_.embedding_scale;
    }
  }

  void norm(const float* factor) {
    for (int64_t r = 0; r < rows_.count; ++r)
      rms_norm(&my_.residual[r * m_.hidden], factor, m_.hidden, m_.eps, &my_.normed[r * m_.hidden]);
  }

  // residual += norm(x)
  void add(const float* x, const float* factor) {
    for (int64_t r = 0; r < rows_.count; ++r) {
      rms_norm(x + r * m_.hidden, factor, m_.hidden, m_.eps, my_.normed.get());
      for (int64_t i = 0; i < m_.hidden; ++i) my_.residual[r * m_.hidden + i] += my_.normed[i];
    }
  }

  // The input as a matrix wants it. to: where that may be put.
  const float* arranged(const Matrix& m, const float* x, const Buffer& to) {
    if (!Shape::changed(m)) return x;
    const int64_t stride = Shape(m).stride();
    for (int64_t r = 0; r < rows_.count; ++r) prepare(m, x + r * m.in, &to[r * stride], my_.room.get());
    return to.get();
  }

  // What the last matrices of some linears on one input x [rows, in] are multiplied with.
  template <int N>
  std::array<const float*, N> inputs(const std::array<const Linear*, N>& parts, const float* x) {
    std::array<const float*, N> out;
    int64_t width = 0;
    for (int i = 0; i < N; ++i) {
      width += parts[i]->first.out;
      if (parts[i]->first.out) out[i] = arranged(parts[i]->first, x, my_.prepared[i]);
    }
    if (width)
      share(width, kStrip, [&](int64_t begin, int64_t end) {
        int64_t before = 0;
        for (int i = 0; i < N; before += parts[i]->first.out, ++i)
          product(parts[i]->first, begin - before, end - before, out[i], shared_.between[i].get(), parts[i]->first.out);
      });
    for (int i = 0; i < N; ++i) {
      const bool same = i > 0 && !parts[i]->first.out && !parts[i - 1]->first.out && alike(parts[i]->last, parts[i - 1]->last);
      const float* input = parts[i]->first.out ? shared_.between[i].get() : x;
      out[i] = same ? out[i - 1] : arranged(parts[i]->last, input, my_.prepared[i]);
    }
    return out;
  }

  // Output rows [begin, end) as far as the matrix has them.
  void product(const Matrix& m, int64_t begin, int64_t end, const float* x, float* y, int64_t stride) const {
    begin = std::max(begin, int64_t{0}), end = std::min(end, m.out);
    if (begin < end) multiply(m, begin, end, x, rows_.count, y, stride);
  }

  // y = x times some matrices, their outputs one after another. x: [rows, in]; y: [rows, all outs].
  template <int N>
  void linear(const std::array<const Linear*, N>& parts, const float* x, float* y) {
    const std::array<const float*, N> from = inputs<N>(parts, x);
    int64_t width = 0;
    for (const Linear* part : parts) width += part->last.out;
    share(width, grain_of(parts[0]->last, width, team_.threads()), [&](int64_t begin, int64_t end) {
      int64_t before = 0;
      for (int i = 0; i < N; before += parts[i]->last.out, ++i)
        product(parts[i]->last, begin - before, end - before, from[i], y + before, width);
    });
  }

  void mlp(const Layer& l) {
    const int64_t width = l.gate.last.out;
    const std::array<const float*, 2> from = inputs<2>({&l.gate, &l.up}, my_.normed.get());
    share(width, grain_of(l.gate.last, width, team_.threads()), [&](int64_t begin, int64_t end) {
      multiply(l.gate.last, begin, end, from[0], rows_.count, my_.gate.get(), width);
      multiply(l.up.last, begin, end, from[1], rows_.count, my_.up.get(), width);
      for (int64_t at = begin, r = 0; r < rows_.count; ++r, at += width)
        gated_gelu(&my_.gate[at], &my_.up[at], end - begin, &shared_.gated[at]);
    });
  }

  const float* cosines(const Layer& l, int64_t row) const {
    return (l.sliding ? m_.sliding_cos : m_.full_cos) + rows_.positions[row] * m_.head_dim / 2;
  }
  const float* sines(const Layer& l, int64_t row) const {
    return (l.sliding ? m_.sliding_sin : m_.full_sin) + rows_.positions[row] * m_.head_dim / 2;
  }
  int64_t cache_offset(const Layer& l, int64_t row, int64_t kv_head) const {
    return (rows_.slots[row] * m_.kv_heads + kv_head) * l.length * m_.head_dim;
  }

  static void put(float* to, const float* from, int64_t n) { std::copy(from, from + n, to); }
  static void put(Bf16* to, const float* from, int64_t n) { std::transform(from, from + n, to, simd::narrow); }

  // Norm and rotate one row's key, and store key and value.
  template <class T>
  void append(const Layer& l, int64_t row, int64_t kv_head) {
    const int64_t d = m_.head_dim;
    float* key = &shared_.qkv[row * (m_.heads + 2 * m_.kv_heads) * d + (m_.heads + kv_head) * d];
    rms_norm(key, l.key_norm, d, m_.eps, key);
    rotate(key, cosines(l, row), sines(l, row), d);
    const int64_t at = cache_offset(l, row, kv_head) + rows_.positions[row] % l.length * d;
    put(static_cast<T*>(l.keys) + at, key, d);
    put(static_cast<T*>(l.values) + at, key + m_.kv_heads * d, d);
  }

  // Heads that share keys and values go together, unless that would leave threads without work.
  template <class T>
  void attention(const Layer& l, int64_t qkv_width) {
    const int64_t group = m_.heads / m_.kv_heads, d = m_.head_dim;
    int64_t together = group;
    while (together % 2 == 0 && rows_.count * m_.heads / together < team_.threads()) together /= 2;
    share(rows_.count * m_.heads / together, 1, [&](int64_t item, int64_t) {
      const int64_t row = item * together / m_.heads, first = item * together % m_.heads;
      float* query = &shared_.qkv[row * qkv_width + first * d];
      for (int64_t h = 0; h < together; ++h) {
        rms_norm(query + h * d, l.query_norm, d, m_.eps, query + h * d);
        rotate(query + h * d, cosines(l, row), sines(l, row), d);
      }
      const int64_t at = cache_offset(l, row, first / group);
      const T *keys = static_cast<const T*>(l.keys) + at, *values = static_cast<const T*>(l.values) + at;
      float* out = &shared_.attended[row * m_.heads * d + first * d];
      Span spans[2];
      visible(l, rows_.positions[row], spans);
      for (int64_t h = 0; h < together;) {
        const int64_t left = together - h;
        auto go = [&](auto heads) {
          constexpr int H = decltype(heads)::value;
          attend<T, H>(query + h * d, keys, values, spans, d, m_.attention_scale, my_.scores.get(), m_.context, out + h * d);
          h += H;
        };
        if (left >= 4) {
          go(std::integral_constant<int, 4>{});
        } else if (left >= 2) {
          go(std::integral_constant<int, 2>{});
        } else {
          go(std::integral_constant<int, 1>{});
        }
      }
    });
  }

  // Where the positions a row sees lie in its ring: one span, or two where the ring goes round.
  void visible(const Layer& l, int64_t position, Span (&spans)[2]) const {
    const int64_t oldest = l.sliding ? std::max<int64_t>(0, position - m_.window + 1) : 0;
    const int64_t begin = oldest % l.length, count = position + 1 - oldest;
    const int64_t straight = std::min(count, l.length - begin);
    spans[0] = {begin, begin + straight};
    spans[1] = {0, count - straight};
  }

  const Model& m_;
  const Rows& rows_;
  Shared& shared_;
  Private& my_;
  Team& team_;
  const int id_;
  float* logits_;
  int64_t phase_ = 0;
};

struct Step {
  Model model;
  std::vector<Layer> layers;
  Shared shared;
  std::vector<std::unique_ptr<Private>> privates;

  Step(const Model& m, int threads)
      : model(m), layers(m.layers, m.layers + m.layer_count), shared(m, Widest(m)) {
    model.layers = layers.data();
    for (int i = 0; i < threads; ++i) privates.push_back(std::make_unique<Private>(m, Widest(m)));
  }
};

constexpr int64_t kPhasesPerLayer = 6 + 4;  // the first matrices of low-rank linears have phases of their own

}  // namespace

extern "C" {

int64_t gemma_max_rows() { return kMaxRows; }

// One matrix alone: y [rows, out] = x [rows, in] · weightsᵀ, for any number of rows. x starts at a multiple of 64 bytes.
void gemma_multiply(const Matrix* m, const float* x, int64_t rows, float* y, int64_t threads) {
  // A panel of weights stays in the second cache while blocks of rows, which stay in the first, pass by.
  const int64_t grain = rows > kMaxRows ? rows_of(*m, kPanelBytes) : grain_of(*m, m->out, threads);
  const int64_t block = m->in <= near_columns(*m) ? 8 : 4;
  const int64_t stride = Shape(*m).stride();
  std::unique_ptr<Buffer> prepared;
  if (Shape::changed(*m)) prepared = std::make_unique<Buffer>(rows * stride);
  const float* inputs = prepared ? prepared->get() : x;
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    if (prepared) {
      const Buffer room(m->in);
#pragma omp for
      for (int64_t r = 0; r < rows; ++r) prepare(*m, x + r * m->in, &(*prepared)[r * stride], room.get());
    }
    if (Shape::integer(*m) && m->format == kInt8 && rows >= kPanelRows) {
      const Buffer packed(panel_bytes(*m) / sizeof(float));
      int8_t* panel = reinterpret_cast<int8_t*>(packed.get());
#pragma omp for schedule(dynamic)
      for (int64_t first = 0; first < m->out; first += kPanel) {
        pack_panel(*m, first, panel);
        int64_t r = 0;
        for (; r + 8 <= rows; r += 8) multiply_panel<8>(*m, first, panel, inputs + r * stride, y + r * m->out);
        for (; r < rows; ++r) multiply_panel<1>(*m, first, panel, inputs + r * stride, y + r * m->out);
      }
    } else {
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t first = 0; first < m->out; first += grain)
        for (int64_t group = 0; group < rows; group += kRowGroup)
          for (int64_t r = group; r < std::min(group + kRowGroup, rows); r += block) {
            const int64_t last = std::min(first + grain, m->out), count = std::min(block, rows - r);
            multiply(*m, first, last, inputs + r * stride, count, y + r * m->out, m->out);
          }
    }
  }
}

// Attention of a chunk of a prompt. query, out: [tokens, heads, head_dim]; keys, values: [kv_heads, positions, head_dim]; token
// t sees positions [begin[t], end[t]), at least one.
void gemma_attend_chunk(const float* query, const float* keys, const float* values, const int64_t* begin, const int64_t* end,
                        int64_t tokens, int64_t heads, int64_t kv_heads, int64_t positions, int64_t head_dim, float scale,
                        int64_t threads, float* out) {
  constexpr int64_t kRows = 4;
  const int64_t group = heads / kv_heads, rows = tokens * group;  // of one KV head: every token's heads
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const Buffer queries(kRows * head_dim), result(kRows * head_dim), scores(kRows * positions);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head)
      for (int64_t first = 0; first < rows; first += kRows) {
        const int64_t count = std::min(kRows, rows - first), at = kv_head * positions * head_dim;
        int64_t places[kRows], begins[kRows], ends[kRows];
        for (int64_t i = 0; i < count; ++i) {
          const int64_t token = (first + i) / group;
          places[i] = (token * heads + kv_head * group + (first + i) % group) * head_dim;
          begins[i] = begin[token], ends[i] = end[token];
          std::copy_n(query + places[i], head_dim, &queries[i * head_dim]);
        }
        const auto go = [&](auto r) {
          attend_rows<decltype(r)::value>(queries.get(), keys + at, values + at, begins, ends, head_dim, scale, scores.get(),
                                          positions, result.get());
        };
        switch (count) {
          case 1: go(std::integral_constant<int, 1>{}); break;
          case 2: go(std::integral_constant<int, 2>{}); break;
          case 3: go(std::integral_constant<int, 3>{}); break;
          default: go(std::integral_constant<int, 4>{});
        }
        for (int64_t i = 0; i < count; ++i) std::copy_n(&result[i * head_dim], head_dim, out + places[i]);
      }
  }
}

// A step over one model and cache, which the caller keeps alive. Not to be used by two threads at once.
void* gemma_step_new(const Model* model, int64_t threads) { return new Step(*model, static_cast<int>(threads)); }

void gemma_step_free(void* step) { delete static_cast<Step*>(step); }

// tokens, slots, positions: [rows], checked by the caller; logits: float32 [rows, vocabulary].
void gemma_step_run(void* step_, const int64_t* tokens, const int64_t* slots, const int64_t* positions, int64_t rows,
                    float* logits) {
  Step& step = *static_cast<Step*>(step_);
  const Rows these{tokens, slots, positions, rows};
  std::unique_ptr<Team> team;
#pragma omp parallel num_threads(static_cast<int>(step.privates.size()))
  {
#pragma omp single
    team = std::make_unique<Team>(omp_get_num_threads(), kPhasesPerLayer * step.model.layer_count + 2);
    const int id = omp_get_thread_num();
    Worker(step.model, these, step.shared, *step.privates[id], *team, id, logits).run();
  }
}

}  // extern "C"
