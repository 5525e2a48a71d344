// The one thread pool. PyTorch brings an OpenMP runtime; a second one would fight it for the cores, so tasks run on
// PyTorch's own threads where that runtime can be found, and torch.set_num_threads is honoured.
#pragma once
#include <stddef.h>

namespace sf {

using Task = void (*)(long index, void* context);

// Runs task(0) ... task(n - 1), each once, on up to num_threads() threads, handing them out one by one: a thread that
// another process has pushed aside does not hold up the rest. Returns when all are done.
void run_tasks(long n, Task task, void* context);

int num_threads();
const char* thread_pool_name();

// Memory of the calling thread that lasts until its next call with the same slot; 64-byte aligned, grows on demand.
enum Slot { ACTIVATIONS, SCALES, SUMS, TASK, TASK_2, PARTIAL, SLOTS };
void* scratch(Slot slot, size_t bytes);

}  // namespace sf
