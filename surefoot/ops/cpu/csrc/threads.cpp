#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <string.h>
#endif

namespace sf {
namespace {

struct Job {
  std::atomic<long> next{0};
  long n;
  Task task;
  void* context;
};

void work(void* p) {
  Job& job = *static_cast<Job*>(p);
  for (long i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n;) job.task(i, job.context);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GetNumThreads = int (*)();

struct Runtime {
  GompParallel parallel = nullptr;
  GetNumThreads threads = nullptr;
};

#if defined(__linux__)
int find_torch(dl_phdr_info* info, size_t, void* out) {
  const char* name = info->dlpi_name;
  if (name && strstr(name, "libtorch_cpu.so")) {
    *static_cast<const char**>(out) = name;
    return 1;
  }
  return 0;
}
#endif

// NOTE: the symbols are looked up in libtorch_cpu and its dependencies, so this is the very runtime that PyTorch uses,
// whatever other OpenMP libraries the process has loaded. at::get_num_threads also sets the calling thread up.
Runtime find_runtime() {
  Runtime found;
#if defined(__linux__)
  const char* path = nullptr;
  dl_iterate_phdr(find_torch, &path);
  void* torch = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  if (torch) {
    found.parallel = reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
    found.threads = reinterpret_cast<GetNumThreads>(dlsym(torch, "_ZN2at15get_num_threadsEv"));
    if (!found.threads) found.parallel = nullptr;
  }
#endif
  return found;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

// Fallback where PyTorch has no GNU-compatible OpenMP (macOS): workers that sleep between jobs.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) std::thread([this] { loop(); }).detach();
    workers_ = threads - 1;
  }

  void run(Job& job) {
    std::lock_guard<std::mutex> one_at_a_time(caller_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      busy_ = workers_;
      ++generation_;
    }
    wake_.notify_all();
    work(&job);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void loop() {
    long seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        job = job_;
      }
      work(job);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int busy_ = 0, workers_ = 0;
  long generation_ = 0;
};

int hardware_threads() {
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

struct Buffer {
  void* memory = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

int num_threads() { return runtime().threads ? runtime().threads() : hardware_threads(); }

const char* thread_pool_name() { return runtime().parallel ? "torch" : "own"; }

void run_tasks(long n, Task task, void* context) {
  const int threads = n > 1 ? num_threads() : 1;
  Job job;
  job.n = n;
  job.task = task;
  job.context = context;
  if (threads <= 1) {
    work(&job);
  } else if (runtime().parallel) {
    runtime().parallel(work, &job, unsigned(n < threads ? n : threads), 0);
  } else {
    // NOTE: never destroyed: detached workers may still be waiting on it when the process ends.
    static Pool& pool = *new Pool(threads);
    pool.run(job);
  }
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
