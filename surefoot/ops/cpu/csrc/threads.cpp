#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <string.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace sf {
namespace {

using GetNumThreads = int (*)();
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Torch {
  GetNumThreads threads = nullptr;
  GompParallel parallel = nullptr;  // of GNU's OpenMP, if PyTorch uses that
};

#if defined(__linux__)
int find_library(dl_phdr_info* info, size_t, void* out) {
  const char* name = info->dlpi_name;
  if (name && strstr(name, "libtorch_cpu.so")) {
    *static_cast<const char**>(out) = name;
    return 1;
  }
  return 0;
}
#endif

// NOTE: looked up in libtorch_cpu and its dependencies: they are those of the PyTorch that this process uses,
// whatever other OpenMP libraries it has loaded.
Torch find_torch() {
  Torch found;
#if defined(__linux__)
  const char* path = nullptr;
  dl_iterate_phdr(find_library, &path);
  if (void* torch = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr) {
    found.threads = reinterpret_cast<GetNumThreads>(dlsym(torch, "_ZN2at15get_num_threadsEv"));
    found.parallel = reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
  }
#endif
  return found;
}

const Torch& torch() {
  static const Torch found = find_torch();
  return found;
}

int hardware_threads() {
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

// PyTorch's own threads spin for milliseconds after each of its loops, on the cores that the workers want. GNU's OpenMP
// stops that when it has more threads than there are cores; as it does not know the workers, it is given some to keep.
// To be called in a thread that lasts.
void stop_spinning(int threads) {
  static std::atomic<bool> stopped{false};
  const int cores = hardware_threads();
  if (!torch().parallel || 2 * threads - 1 <= cores || stopped.exchange(true)) return;
  if (threads <= cores) torch().parallel([](void*) {}, nullptr, unsigned(cores - threads + 2), 0);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// How long a thread looks for news before it sleeps. A worker: longer than the gaps between the kernels of a step. The
// caller: longer than a task, yet no longer, because the thread that has the last one may be waiting for this core.
constexpr std::chrono::microseconds SPIN{100};

template <class Ready> bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + SPIN;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// One loop at a time; its tasks are taken one by one, by the caller and by whichever workers are awake.
//
// `ticket_` holds the loop's number and, in the low bits, how many of its tasks nobody has taken yet. Who lowers that
// by a compare-and-swap has a task, and until the task is counted off `left_` the loop cannot end, so `task_`,
// `context_` and `n_` are its own. A worker that comes late finds nothing to lower and touches nothing else.
class Pool {
 public:
  // False, with nothing done, while another loop is running: another thread's, or the one that this is a task of.
  bool run(long n, Task task, void* context, int threads) {
    if (uint64_t(n) > UNTAKEN || busy_.exchange(true, std::memory_order_acquire)) return false;
    if (active_.load(std::memory_order_relaxed) != threads - 1) resize(threads - 1);
    task_ = task;
    context_ = context;
    n_ = n;
    left_.store(n, std::memory_order_relaxed);
    const uint64_t number = ticket_.load(std::memory_order_relaxed) | UNTAKEN;
    // NOTE: sequentially consistent, like `sleepers_`: a worker sees the ticket, or the caller sees that it sleeps.
    ticket_.store(number + 1 + uint64_t(n));
    if (const int sleepers = sleepers_.load()) wake(n - 1 < sleepers ? int(n - 1) : 0);
    take();
    const auto ended = [this] { return left_.load() == 0; };
    if (!ended() && !spin_until(ended)) {
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_.store(true);
      ended_.wait(lock, ended);
      waiting_.store(false);
    }
    const bool failed = failed_.exchange(false);
    busy_.store(false, std::memory_order_release);
    if (failed) throw std::bad_alloc();
    return true;
  }

 private:
  static constexpr uint64_t UNTAKEN = (uint64_t(1) << 24) - 1;  // leaves numbers for some years of loops

  void take() {
    long done = 0;
    for (uint64_t t = ticket_.load(std::memory_order_acquire); t & UNTAKEN;) {
      if (!ticket_.compare_exchange_weak(t, t - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      try {
        task_(n_ - long(t & UNTAKEN), context_);
      } catch (...) {  // scratch memory is all that can fail
        failed_.store(true);
      }
      ++done;
      t = ticket_.load(std::memory_order_acquire);
    }
    if (done && left_.fetch_sub(done) == done && waiting_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_.notify_one();
    }
  }

  void work(int id) {
    const auto surplus = [this, id] { return id > active_.load(std::memory_order_relaxed); };
    const auto news = [this] { return (ticket_.load() & UNTAKEN) != 0; };
    stop_spinning(active_.load() + 1);
    for (;;) {
      if (!spin_until(news)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        work_.wait(lock, news);
        --sleepers_;
      }
      if (surplus()) {
        std::unique_lock<std::mutex> lock(mutex_);
        resized_.wait(lock, [&] { return !surplus(); });
      } else {
        take();
      }
    }
  }

  // Wakes `count` sleeping workers, or all of them if it is 0.
  void wake(int count) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!count) work_.notify_all();
    while (count-- > 0) work_.notify_one();
  }

  void resize(int workers) {
    try {
      for (; workers_ < workers; ++workers_) std::thread(&Pool::work, this, workers_ + 1).detach();
    } catch (const std::system_error&) {
      workers = workers_;  // the system gives no more threads
    }
    std::lock_guard<std::mutex> lock(mutex_);
    active_.store(workers, std::memory_order_relaxed);
    resized_.notify_all();
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<long> left_{0};
  alignas(64) Task task_ = nullptr;
  void* context_ = nullptr;
  long n_ = 0;
  std::atomic<int> active_{0}, sleepers_{0};
  std::atomic<bool> busy_{false}, waiting_{false}, failed_{false};
  int workers_ = 0;
  std::mutex mutex_;
  std::condition_variable work_, ended_, resized_;
};

// NOTE: never destroyed: detached workers still wait on it when the process ends. A forked child has no workers, and
// the parent's may have been in the middle of something: it begins with a new one.
Pool* pool = nullptr;

void make_pool() { pool = new Pool; }

Pool& the_pool() {
  static const bool made = [] {
    make_pool();
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, make_pool);
#endif
    return true;
  }();
  (void)made;
  return *pool;
}

struct Buffer {
  void* memory = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

int num_threads() { return torch().threads ? torch().threads() : hardware_threads(); }

void run_tasks(long n, Task task, void* context) {
  const int threads = n > 1 ? num_threads() : 1;
  if (threads > 1 && the_pool().run(n, task, context, threads)) return;
  for (long i = 0; i < n; ++i) task(i, context);
}

void* scratch(Slot slot, size_t bytes) {
  thread_local Buffer buffers[SLOTS];
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    std::free(b.memory);
    b.size = 0;
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    b.memory = std::aligned_alloc(4096, rounded);
    if (!b.memory) throw std::bad_alloc();
    b.size = rounded;
  }
  return b.memory;
}

}  // namespace sf
