// Just enough of CUDA for the kernels of the cache operator to run on a CPU: one OS thread per CUDA thread, blocks one
// after another. Slow, and exact.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static

struct Index {
    int x = 0, y = 0, z = 0;
};
static Index blockIdx, blockDim;
static thread_local Index threadIdx;

namespace host {
struct Warp {
    explicit Warp(int lanes) : barrier(lanes) {}
    std::barrier<> barrier;
    float values[32] = {};
    std::atomic<unsigned> votes{0};
};
static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<std::unique_ptr<Warp>> warps;
inline int linear() { return threadIdx.y * blockDim.x + threadIdx.x; }

inline void launch(Index grid, Index block, const std::function<void()>& kernel) {
    const int count = block.x * block.y;
    blockDim = block;
    for (int by = 0; by < grid.y; ++by) {
        for (int bx = 0; bx < grid.x; ++bx) {
            blockIdx = {bx, by, 0};
            block_barrier = std::make_unique<std::barrier<>>(count);
            warps.clear();
            for (int i = 0; i < (count + 31) / 32; ++i) {
                warps.push_back(std::make_unique<Warp>(std::min(32, count - 32 * i)));
            }
            std::vector<std::thread> threads;
            for (int t = 0; t < count; ++t) {
                threads.emplace_back([&, t] {
                    threadIdx = {t % block.x, t / block.x, 0};
                    kernel();
                });
            }
            for (auto& thread : threads) {
                thread.join();
            }
        }
    }
}
}  // namespace host

inline void __syncthreads() { host::block_barrier->arrive_and_wait(); }
inline float __shfl_down_sync(unsigned, float value, int offset) {
    host::Warp& warp = *host::warps[host::linear() / 32];
    const int lane = host::linear() % 32;
    warp.values[lane] = value;
    warp.barrier.arrive_and_wait();
    const float other = lane + offset < 32 ? warp.values[lane + offset] : value;
    warp.barrier.arrive_and_wait();
    return other;
}
inline unsigned __ballot_sync(unsigned, bool flag) {
    host::Warp& warp = *host::warps[host::linear() / 32];
    const int lane = host::linear() % 32;
    if (lane == 0) {
        warp.votes = 0;
    }
    warp.barrier.arrive_and_wait();
    if (flag) {
        warp.votes.fetch_or(1u << lane);
    }
    warp.barrier.arrive_and_wait();
    const unsigned votes = warp.votes;
    warp.barrier.arrive_and_wait();
    return votes;
}
inline unsigned atomicAdd(unsigned* place, unsigned value) { return __atomic_fetch_add(place, value, __ATOMIC_SEQ_CST); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

struct half_t {
    _Float16 value;
};
inline float to_float(float x) { return x; }
inline float to_float(half_t x) { return static_cast<float>(x.value); }
template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline half_t from_float<half_t>(float x) { return {static_cast<_Float16>(x)}; }
// The kernels are also instantiated for bfloat16, which this compiler may not know: not tested here.
struct bfloat16_t {
    unsigned short bits;
};
inline float to_float(bfloat16_t) { return NAN; }
template <>
inline bfloat16_t from_float<bfloat16_t>(float) { return {0}; }
