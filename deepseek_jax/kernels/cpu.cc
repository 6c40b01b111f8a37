// Products of few rows on a CPU, for inference (kernels/cpu.py compiles them).
//
// A decoded token reads every matrix once and does little with it, so that
// memory sets the time. XLA multiplies a matrix of 1 MB with one core, copies
// one of an expert's before that, and packs it anew for two rows or more; here
// all cores read it where it lies, once. Every sum is one of a fixed order,
// however many cores there are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 8;
#else
constexpr int kLanes = 8, kRows = 4;
#endif
constexpr int kDepth = 16;    // Rows of a matrix that are read side by side.
constexpr int kNarrow = 128, kWide = 512;  // Columns of a task.
constexpr int kStrips = 4;     // Of an expert's rows in a task, at most.
constexpr int kSpins = 1000;   // Some 50 us.
constexpr int64_t kKept = 1 << 22;  // Numbers of a scratch; a prompt has more.

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct Bf16 {
  uint16_t bits;
};

Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

Vec load(const Bf16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, Bits) << 16);
}

void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

float sum_of(Vec v) {
  float part[kLanes];
  store(part, v);
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}

float number(float x) { return x; }

float number(Bf16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

void put(float* p, float x) { *p = x; }

void put(Bf16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += std::isnan(x) ? 0 : 0x7fff + (bits >> 16 & 1);  // To nearest even.
  p->bits = std::isnan(x) ? bits >> 16 | 0x40 : bits >> 16;
}

void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Cores that this process may use.
int cores() {
#ifdef __linux__
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#endif
  return std::thread::hardware_concurrency();
}

// Threads that share a call's tasks. XLA's own wait for work so eagerly, all of
// them, that they keep a core from those that have some. A thread that comes
// late finds nothing left to do: no call waits for another thread to begin.
class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // Its threads outlive everything.
    return *pool;
  }

  int size() const { return size_; }

  // Runs f(0) to f(n - 1).
  template <typename F>
  void run(int64_t n, F f) {
    if (n < 2 || size_ < 2) {
      for (int64_t i = 0; i < n; ++i) f(i);
      return;
    }
    auto job = std::make_shared<Job>(n, f);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      ++posted_;
    }
    changed_.notify_all();
    job->work();
    // Then the core may be what the last task's thread is waiting for.
    for (int i = 0; job->done.load() < n; ++i)
      i < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  struct Job {
    Job(int64_t n, std::function<void(int64_t)> f) : n(n), f(f) {}

    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < n; done.fetch_add(1)) f(i);
    }

    const int64_t n;
    const std::function<void(int64_t)> f;
    std::atomic<int64_t> next{0}, done{0};
  };

  Pool() : size_(std::clamp(cores(), 1, 16)) {
    for (int i = 1; i < size_; ++i) std::thread([this] { loop(); }).detach();
  }

  void loop() {
    for (int64_t seen = 0;;) {
      // The next call is some microseconds away, or a sleep.
      for (int i = 0; i < kSpins && posted_.load() == seen; ++i) pause();
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return posted_.load() != seen; });
        seen = posted_.load();
        job = job_;
      }
      job->work();
    }
  }

  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<Job> job_;
  std::atomic<int64_t> posted_{0};
};

// Likewise, where a task alone is not worth another thread.
template <typename F>
void run_eights(int64_t n, F f) {
  Pool::get().run((n + 7) / 8, [=](int64_t i) {
    for (int64_t j = 8 * i; j < std::min(n, 8 * i + 8); ++j) f(j);
  });
}

// The next larger number of rows that there is code for.
int padded(int rows) {
  int p = 1;
  while (p < rows) p *= 2;
  return p;
}

template <typename F>
void for_rows(int padded, F f) {
  switch (padded) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, kRows>());
  }
}

// y [n, padded(rows)] = the rows x, side by side. What is added to make their
// number a power of two is the first again.
template <typename T>
void turn(int rows, const T* const* x, int64_t n, float* y) {
  for_rows(padded(rows), [=](auto count) {
    constexpr int R = count;
    const T* from[R];
    for (int r = 0; r < R; ++r) from[r] = x[r < rows ? r : 0];
    for (int64_t i = 0; i < n; ++i)
      for (int r = 0; r < R; ++r) y[i * R + r] = number(from[r][i]);
  });
}

// y[r, n] += sum over k of x[k, r] w[k, n], for U vectors of n and kDepth k, or
// `depth` if that is less.
template <int R, int U, bool kWhole, typename T>
inline void tile(const float* x, const T* w, int64_t stride, int depth,
                 float* y, int64_t width) {
  Vec sum[R][U];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) sum[r][u] = load(y + r * width + u * kLanes);
#pragma GCC unroll 16
  for (int k = 0; k < (kWhole ? kDepth : depth); ++k) {
    Vec row[U];
    for (int u = 0; u < U; ++u) {
      const T* p = w + k * stride + u * kLanes;
      row[u] = load(p);
      if (R > 1) __builtin_prefetch(p + kDepth * stride);
    }
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < U; ++u) sum[r][u] += x[k * R + r] * row[u];
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) store(y + r * width + u * kLanes, sum[r][u]);
}

// y [rows, width] = x [K, padded(rows)] w [K, columns], of rows `stride` apart.
template <typename T>
void multiply(int rows, const float* x, const T* w, int64_t stride, int64_t K,
              int64_t columns, float* y, int64_t width) {
  std::memset(y, 0, sizeof(float) * padded(rows) * width);
  for_rows(padded(rows), [=](auto count) {
    constexpr int R = count, U = R * 4 <= 2 * kRows ? 4 : 2;
    for (int64_t k = 0; k < K; k += kDepth) {
      int depth = std::min<int64_t>(kDepth, K - k), n = 0;
      const float* xk = x + k * R;
      const T* wk = w + k * stride;
      if (depth == kDepth)
        for (; n + U * kLanes <= columns; n += U * kLanes)
          tile<R, U, true>(xk, wk + n, stride, depth, y + n, width);
      for (; n + kLanes <= columns; n += kLanes)
        tile<R, 1, false>(xk, wk + n, stride, depth, y + n, width);
      for (; n < columns; ++n)
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < depth; ++i)
            y[r * width + n] += xk[i * R + r] * number(wk[i * stride + n]);
    }
  });
}

// y [rows, width] = x [padded(rows), K] w [columns, K]^T.
template <typename T>
void multiply_transposed(int rows, const float* x, const T* w, int64_t K,
                         int64_t columns, float* y, int64_t width) {
  for_rows(padded(rows), [=](auto count) {
    constexpr int R = count, U = R * 4 <= 2 * kRows ? 4 : 2;
    auto some = [=](auto together, int64_t n) {
      constexpr int W = together;
      Vec sum[R][W] = {};
      int64_t k = 0;
      for (; k + kLanes <= K; k += kLanes) {
        Vec row[W];
        for (int u = 0; u < W; ++u) {
          const T* p = w + (n + u) * K + k;
          row[u] = load(p);
          __builtin_prefetch(p + W * K);
        }
        for (int r = 0; r < R; ++r) {
          Vec xs = load(x + r * K + k);
          for (int u = 0; u < W; ++u) sum[r][u] += xs * row[u];
        }
      }
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < W; ++u) {
          float total = sum_of(sum[r][u]);
          for (int64_t i = k; i < K; ++i)
            total += x[r * K + i] * number(w[(n + u) * K + i]);
          y[r * width + n + u] = total;
        }
    };
    int64_t n = 0;
    for (; n + U <= columns; n += U) some(std::integral_constant<int, U>(), n);
    for (; n < columns; ++n) some(std::integral_constant<int, 1>(), n);
  });
}

// Memory of a thread.  It stays, for what is freed after each call would be
// faulted in again, unless it is large: XLA calls from many threads.
class Scratch {
 public:
  // Of no known contents, until the thread asks again.
  float* get(int64_t size) {
    if (size > size_) {
      numbers_.reset();
      numbers_.reset(new float[size]);
      size_ = size;
    }
    return numbers_.get();
  }

  void trim() {
    if (size_ <= kKept) return;
    numbers_.reset();
    size_ = 0;
  }

 private:
  std::unique_ptr<float[]> numbers_;
  int64_t size_ = 0;
};

// Columns of a task: many if there are many, so that memory is read in pieces
// that are long, and yet each thread has some tasks.
int64_t columns_of(int64_t n, int64_t groups) {
  int64_t some = n * groups / (4 * Pool::get().size()) / kNarrow * kNarrow;
  return std::clamp<int64_t>(some, kNarrow, kWide);
}

struct Shape {
  int64_t R, G, K, N;
};

template <bool kTransposed, typename T, typename Y>
void product(const T* x, const T* w, Y* y, Shape s) {
  static thread_local Scratch buffer;
  const int64_t R = s.R, G = s.G, K = s.K, N = s.N;
  int64_t strips = (R + kRows - 1) / kRows;
  float* packed = buffer.get(G * strips * kRows * K);
  for (int64_t g = 0; g < G; ++g)
    for (int64_t i = 0; i < strips; ++i) {
      int rows = std::min<int64_t>(kRows, R - i * kRows), P = padded(rows);
      float* to = packed + (g * strips + i) * kRows * K;
      for (int r = 0; r < P; ++r) {
        const T* from = x + ((i * kRows + r) * G + g) * K;
        for (int64_t k = 0; k < K; ++k)
          to[kTransposed ? r * K + k : k * P + r] =
              r < rows ? number(from[k]) : 0;
      }
    }
  int64_t columns = columns_of(N, G);
  int64_t tasks = (N + columns - 1) / columns;
  Pool::get().run(G * tasks, [=](int64_t task) {
    alignas(64) float sums[kRows * kWide];
    int64_t g = task / tasks, n = task % tasks * columns;
    int64_t width = std::min(columns, N - n);
    for (int64_t i = 0; i < strips; ++i) {
      int rows = std::min<int64_t>(kRows, R - i * kRows);
      const float* from = packed + (g * strips + i) * kRows * K;
      const T* matrix = w + g * K * N;
      if (kTransposed)
        multiply_transposed(rows, from, matrix + n * K, K, width, sums, width);
      else
        multiply(rows, from, matrix + n, N, K, width, sums, width);
      for (int r = 0; r < rows; ++r)
        for (int64_t j = 0; j < width; ++j)
          put(y + ((i * kRows + r) * G + g) * N + n + j, sums[r * width + j]);
    }
  });
  buffer.trim();
}

// By exp(x) = 2^n exp(f), |f| <= ln(2) / 2, and a polynomial for exp(f), which
// errs by some 2^-23 of itself.
Vec exp(Vec x) {
  x = x < -87.f ? Vec{} - 87.f : x > 88.f ? Vec{} + 88.f : x;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23
  Vec n = x * 1.44269504f + kRound;
  Ints exponent = (Ints)n - 0x4b400000 + 127;
  n -= kRound;
  Vec f = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vec e = f * (1.f / 720) + 1.f / 120;
  e = e * f + 1.f / 24;
  e = e * f + 1.f / 6;
  e = e * f + .5f;
  e = e * f + 1.f;
  e = e * f + 1.f;
  return e * (Vec)(exponent << 23);
}

Vec silu(Vec x) { return x / (1.f + exp(-x)); }

// Scores of one row become its probabilities; of `n` keys it sees `visible`.
// There is room for whole vectors.
void softmax(float* row, int64_t n, int64_t visible, float scale) {
  float top = -INFINITY;
  for (int64_t i = 0; i < visible; ++i) top = std::max(top, row[i] *= scale);
  for (int64_t i = visible; i < n + kLanes; ++i) row[i] = -INFINITY;
  Vec sums = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec e = exp(load(row + i) - top);
    e = load(row + i) == -INFINITY ? Vec{} : e;
    store(row + i, e);
    sums += e;
  }
  float by = visible > 0 ? 1 / sum_of(sums) : 0;
  for (int64_t i = 0; i < n; ++i) row[i] *= by;
}

struct Sight {
  int64_t B, T, N, X, S, width;
};

template <typename T>
void attend(const T* q, const T* cache, const int32_t* positions, T* y,
            Sight sight, float scale) {
  const int64_t B = sight.B, tokens = sight.T, N = sight.N, X = sight.X;
  const int64_t S = sight.S, width = sight.width;
  int64_t queries = tokens * N, most = kRows;
  while (most > 1 && B * ((queries + most - 1) / most) < Pool::get().size())
    most /= 2;
  int64_t strips = (queries + most - 1) / most;
  Pool::get().run(B * strips, [=](int64_t task) {
    static thread_local Scratch buffers[4];
    int64_t b = task / strips, first = task % strips * most;
    int rows = std::min(most, queries - first), P = padded(rows);
    auto visible = [=](int64_t r) {
      int64_t last = positions[b * tokens + (first + r) / N];
      return std::clamp<int64_t>(last + 1, 0, S);
    };
    int64_t n = 0;
    for (int r = 0; r < rows; ++r) n = std::max(n, visible(r));
    const T* keys = cache + b * S * X;
    float* in = buffers[0].get(P * X);
    for (int64_t i = 0; i < P * X; ++i)
      in[i] = i < rows * X ? number(q[(b * queries + first) * X + i]) : 0;
    int64_t room = n + kLanes;
    float* scores = buffers[1].get(P * room + kLanes);
    multiply_transposed(rows, in, keys, X, n, scores, room);
    const float* seen[kRows];
    for (int r = 0; r < rows; ++r) {
      softmax(scores + r * room, n, visible(r), scale);
      seen[r] = scores + r * room;
    }
    float* probs = buffers[2].get(P * room);
    turn(rows, seen, n, probs);
    float* out = buffers[3].get(P * width);
    multiply(rows, probs, keys, X, n, width, out, width);
    for (int64_t i = 0; i < rows * width; ++i)
      put(y + (b * queries + first) * width + i, out[i]);
  });
}

// Up to kRows rows of one expert; `first` is their number among all sorted
// ones, and `at` the place from which on they are kept.
struct Strip {
  int64_t expert, first, at;
  int rows;
};

struct Sorted {
  std::vector<int64_t> order;   // Of sorted rows: token * K + choice.
  std::vector<int64_t> places;  // Of token * K + choice: where; -1: nowhere.
  std::vector<Strip> strips;
  std::vector<std::pair<int, int>> tasks;  // Strips of one expert, from and to.
  int64_t size = 0;  // Places.
};

Sorted sort(const int32_t* ids, int64_t n, int64_t E) {
  std::vector<int64_t> starts(E + 1);
  auto is_one = [=](int64_t i) { return ids[i] >= 0 && ids[i] < E; };
  for (int64_t i = 0; i < n; ++i)
    if (is_one(i)) ++starts[ids[i] + 1];
  for (int64_t e = 0; e < E; ++e) starts[e + 1] += starts[e];
  Sorted s{std::vector<int64_t>(starts[E]), std::vector<int64_t>(n, -1)};
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < n; ++i)
    if (is_one(i)) s.order[next[ids[i]]++] = i;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t i = starts[e], begun = 0; i < starts[e + 1]; i += kRows) {
      int rows = std::min<int64_t>(kRows, starts[e + 1] - i);
      if (begun++ % kStrips == 0)
        s.tasks.push_back({int(s.strips.size()), int(s.strips.size())});
      ++s.tasks.back().second;
      s.strips.push_back({e, i, s.size, rows});
      for (int r = 0; r < rows; ++r) s.places[s.order[i + r]] = s.size + r;
      s.size += padded(rows);
    }
  return s;
}

struct Sizes {
  int64_t T, K, E, D, F;
};

template <typename T>
void experts(const T* x, const T* w1, const T* w2, const T* w3,
             const int32_t* ids, const float* gates, T* y, Sizes sizes) {
  static thread_local Scratch buffers[3];
  const int64_t tokens = sizes.T, K = sizes.K, E = sizes.E, D = sizes.D;
  const int64_t F = sizes.F;
  const Sorted sorted = sort(ids, tokens * K, E);
  const Sorted* s = &sorted;
  float* in = buffers[0].get(s->size * D);
  float* hidden = buffers[1].get(s->size * F);
  float* out = buffers[2].get(s->size * D);
  int64_t count = s->tasks.size();

  run_eights(s->strips.size(), [=](int64_t i) {
    const Strip& strip = s->strips[i];
    const T* rows[kRows];
    for (int r = 0; r < strip.rows; ++r)
      rows[r] = x + s->order[strip.first + r] / K * D;
    turn(strip.rows, rows, D, in + strip.at * D);
  });
  int64_t columns = columns_of(F, count);
  int64_t pieces = (F + columns - 1) / columns;
  Pool::get().run(count * pieces, [=](int64_t task) {
    alignas(64) float gate[kRows * kWide], up[kRows * kWide];
    auto [from, to] = s->tasks[task / pieces];
    int64_t n = task % pieces * columns, width = std::min(columns, F - n);
    for (int i = from; i < to; ++i) {
      const Strip& strip = s->strips[i];
      const float* xs = in + strip.at * D;
      int64_t matrix = strip.expert * D * F + n;
      multiply(strip.rows, xs, w1 + matrix, F, D, width, gate, columns);
      multiply(strip.rows, xs, w3 + matrix, F, D, width, up, columns);
      const float* rows[kRows];
      for (int r = 0; r < strip.rows; ++r) {
        float by = gates[s->order[strip.first + r]];
        for (int64_t j = 0; j < width; j += kLanes) {
          int64_t at = r * columns + j;
          store(gate + at, silu(load(gate + at)) * load(up + at) * by);
        }
        rows[r] = gate + r * columns;
      }
      turn(strip.rows, rows, width,
           hidden + strip.at * F + n * padded(strip.rows));
    }
  });
  columns = columns_of(D, count);
  pieces = (D + columns - 1) / columns;
  Pool::get().run(count * pieces, [=](int64_t task) {
    alignas(64) float sums[kRows * kWide];
    auto [from, to] = s->tasks[task / pieces];
    int64_t n = task % pieces * columns, width = std::min(columns, D - n);
    for (int i = from; i < to; ++i) {
      const Strip& strip = s->strips[i];
      multiply(strip.rows, hidden + strip.at * F, w2 + strip.expert * F * D + n,
               D, F, width, sums, columns);
      for (int r = 0; r < strip.rows; ++r)
        std::copy_n(sums + r * columns, width, out + (strip.at + r) * D + n);
    }
  });
  run_eights(tokens, [=](int64_t t) {
    static thread_local Scratch scratch;
    float* sum = scratch.get(D);
    std::fill_n(sum, D, 0.f);
    for (int64_t k = 0; k < K; ++k) {
      int64_t place = s->places[t * K + k];
      if (place < 0) continue;
      for (int64_t d = 0; d < D; ++d) sum[d] += out[place * D + d];
    }
    for (int64_t d = 0; d < D; ++d) put(y + t * D + d, sum[d]);
  });
  for (Scratch& buffer : buffers) buffer.trim();
}

template <typename T, typename Buffer>
T* data(Buffer&& buffer) {
  return reinterpret_cast<T*>(buffer.untyped_data());
}

ffi::Error Product(ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::Result<ffi::AnyBuffer> y, bool transposed) {
  auto in = x.dimensions(), out = y->dimensions();
  Shape shape{in[0], in[1], in[2], out[2]};
  auto run = [&](auto type, auto result) {
    using T = decltype(type);
    using Y = decltype(result);
    auto f = transposed ? product<true, T, Y> : product<false, T, Y>;
    f(data<T>(x), data<T>(w), data<Y>(*y), shape);
  };
  bool is_float = x.element_type() == ffi::F32;
  if (is_float) run(float(), float());
  else if (y->element_type() == ffi::F32) run(Bf16(), float());
  else run(Bf16(), Bf16());
  return ffi::Error::Success();
}

ffi::Error Attention(ffi::AnyBuffer q, ffi::AnyBuffer cache,
                     ffi::Buffer<ffi::S32> positions,
                     ffi::Result<ffi::AnyBuffer> y, float scale) {
  auto d = q.dimensions();
  Sight sight{d[0], d[1], d[2], d[3],
              cache.dimensions()[1], y->dimensions()[3]};
  auto run = [&](auto type) {
    using T = decltype(type);
    attend(data<T>(q), data<T>(cache), positions.typed_data(), data<T>(*y),
           sight, scale);
  };
  if (q.element_type() == ffi::F32) run(float());
  else run(Bf16());
  return ffi::Error::Success();
}

ffi::Error Experts(ffi::AnyBuffer x, ffi::AnyBuffer w1,
                   ffi::AnyBuffer w2, ffi::AnyBuffer w3,
                   ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::F32> gates,
                   ffi::Result<ffi::AnyBuffer> y) {
  Sizes sizes{ids.dimensions()[0], ids.dimensions()[1], w1.dimensions()[0],
              w1.dimensions()[1], w1.dimensions()[2]};
  auto run = [&](auto type) {
    using T = decltype(type);
    experts(data<T>(x), data<T>(w1), data<T>(w2), data<T>(w3),
            ids.typed_data(), gates.typed_data(), data<T>(*y), sizes);
  };
  if (x.element_type() == ffi::F32) run(float());
  else run(Bf16());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(few_rows_product, Product,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(few_rows_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(few_rows_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));
