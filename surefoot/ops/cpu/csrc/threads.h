// The thread pool of all kernels. Its size is that of PyTorch's, which torch.set_num_threads sets; its threads are its
// own, because an OpenMP loop ends only when every thread of its team has come, and one that the system runs late (a
// server's event loop has its core) holds up the whole step. Here a loop ends when its tasks are done.
#pragma once
#include <stddef.h>

namespace sf {

using Task = void (*)(long index, void* context);

// Runs task(0) ... task(n - 1), each once, on up to num_threads() threads, handing them out one by one. Returns when
// all are done. A loop within a task, and one begun while another thread's is running, run on the calling thread alone.
void run_tasks(long n, Task task, void* context);

int num_threads();

// Memory of the calling thread that lasts until its next call with the same slot; 64-byte aligned, grows on demand.
enum Slot { ACTIVATIONS, SCALES, SUMS, TASK, TASK_2, PARTIAL, SLOTS };
void* scratch(Slot slot, size_t bytes);

}  // namespace sf
