// The Python side of the kernels: plain functions of integers (addresses, sizes, codes) and floats. Nothing here knows
// PyTorch, so that the extension builds without it; surefoot/ops/cpu checks shapes, dtypes and strides.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "isa_select.h"
#include "kernels.h"
#include "plain.h"

namespace {

using namespace sf;

const Kernels* current = nullptr;
constexpr long INTERFACE = 3;  // raised with any change of the functions' arguments; surefoot/ops/cpu/__init__.py has it, too

// Arguments in order. None is a null pointer.
class Args {
 public:
  Args(PyObject* const* args, Py_ssize_t given, Py_ssize_t wanted) : next_(args) {
    if (given != wanted) PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, given);
  }
  long integer() {
    if (PyErr_Occurred()) return 0;
    return PyLong_AsLong(*next_++);
  }
  template <class T = void> T* pointer() {
    if (PyErr_Occurred()) return nullptr;
    PyObject* o = *next_++;
    return o == Py_None ? nullptr : static_cast<T*>(PyLong_AsVoidPtr(o));
  }
  float real() {
    if (PyErr_Occurred()) return 0;
    return float(PyFloat_AsDouble(*next_++));
  }
  bool ok() const { return !PyErr_Occurred(); }

 private:
  PyObject* const* next_;
};

template <class Call> PyObject* without_gil(const Call& call) {
  bool failed = false;
  Py_BEGIN_ALLOW_THREADS
  try {
    call();
  } catch (const std::exception&) {
    failed = true;
  }
  Py_END_ALLOW_THREADS
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 17);
  Linear j{};
  j.x = a.pointer(); j.ldx = a.integer(); j.xtype = int(a.integer());
  j.y = a.pointer(); j.ldy = a.integer();
  j.bias = a.pointer(); j.bias_type = int(a.integer());
  j.w = a.pointer(); j.wscale = a.pointer(); j.scale_type = int(a.integer());
  j.M = a.integer(); j.N = a.integer(); j.K = a.integer(); j.group = a.integer();
  j.kind = int(a.integer()); j.act_bits = int(a.integer()); j.packed = int(a.integer());
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->linear(j); });
}

PyObject* pack(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 4);
  void* p = a.pointer();
  const long rows = a.integer(), columns = a.integer(), bytes = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { sf::pack_panels(p, rows, columns, bytes); });
}

PyObject* attention(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 16);
  Attention j{};
  j.q = a.pointer(); j.ldq = a.integer(); j.out = a.pointer(); j.dtype = int(a.integer());
  j.k = a.pointer(); j.v = a.pointer();
  j.block_table = a.pointer<int32_t>(); j.max_blocks = a.integer();
  j.starts = a.pointer<int32_t>(); j.lens = a.pointer<int32_t>();
  j.N = a.integer(); j.H = a.integer(); j.Hk = a.integer(); j.D = a.integer(); j.block_size = a.integer();
  j.scale = a.real();
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->attention(j); });
}

PyObject* delta(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 18);
  Delta j{};
  j.q = a.pointer(); j.ldq = a.integer(); j.k = a.pointer(); j.ldk = a.integer(); j.v = a.pointer(); j.ldv = a.integer();
  j.dtype = int(a.integer());
  j.g = a.pointer<float>(); j.beta = a.pointer<float>();
  j.state = a.pointer<float>(); j.slots = a.pointer<int64_t>();
  j.out = a.pointer(); j.starts = a.pointer<int32_t>();
  j.N = a.integer(); j.Hk = a.integer(); j.Hv = a.integer(); j.Dk = a.integer(); j.Dv = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->delta(j); });
}

PyObject* conv(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 13);
  Conv j{};
  j.x = a.pointer(); j.ldx = a.integer(); j.w = a.pointer(); j.wtype = int(a.integer()); j.bias = a.pointer();
  j.state = a.pointer(); j.slots = a.pointer<int64_t>(); j.out = a.pointer(); j.dtype = int(a.integer());
  j.starts = a.pointer<int32_t>();
  j.N = a.integer(); j.C = a.integer(); j.taps = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->conv(j); });
}

PyObject* norm(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 12);
  Norm j{};
  j.x = a.pointer(); j.ldx = a.integer(); j.other = a.pointer(); j.ldo = a.integer();
  j.w = a.pointer(); j.wtype = int(a.integer());
  j.y = a.pointer(); j.sum = a.pointer(); j.dtype = int(a.integer());
  j.rows = a.integer(); j.width = a.integer(); j.eps = a.real();
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->norm(j); });
}

PyObject* gate(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 9);
  const int op = int(a.integer()), dtype = int(a.integer());
  const void* x = a.pointer(); const long ldx = a.integer();
  const void* y = a.pointer(); const long ldy = a.integer();
  void* out = a.pointer(); const long rows = a.integer(), width = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->gate(op, dtype, x, ldx, y, ldy, out, rows, width); });
}

PyObject* rotary(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 14);
  const int dtype = int(a.integer());
  const void* q = a.pointer(); const long ldq = a.integer();
  const void* k = a.pointer(); const long ldk = a.integer();
  const float* cos = a.pointer<float>();
  const float* sin = a.pointer<float>();
  void* q_out = a.pointer();
  void* k_out = a.pointer();
  const long tokens = a.integer(), heads = a.integer(), kv_heads = a.integer(), dim = a.integer(), half = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] {
    current->rotary(dtype, q, ldq, cos, sin, q_out, tokens, heads, dim, half);
    current->rotary(dtype, k, ldk, cos, sin, k_out, tokens, kv_heads, dim, half);
  });
}

PyObject* argmax(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 7);
  const int dtype = int(a.integer());
  const void* x = a.pointer(); const long ldx = a.integer();
  void* best = a.pointer();
  int64_t* index = a.pointer<int64_t>();
  const long rows = a.integer(), width = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->argmax(dtype, x, ldx, best, index, rows, width); });
}

PyObject* kv_write(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 9);
  const void* k = a.pointer(); const long ldk = a.integer();
  const void* v = a.pointer(); const long ldv = a.integer();
  void* k_cache = a.pointer();
  void* v_cache = a.pointer();
  const int64_t* slots = a.pointer<int64_t>();
  const long tokens = a.integer(), bytes = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { sf::kv_write(k, ldk, v, ldv, k_cache, v_cache, slots, tokens, bytes); });
}

PyObject* gather(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 6);
  const void* table = a.pointer();
  const long rows = a.integer(), bytes = a.integer();
  const int64_t* ids = a.pointer<int64_t>();
  void* out = a.pointer();
  const long count = a.integer();
  if (!a.ok()) return nullptr;
  long bad = -1;
  PyObject* none = without_gil([&] { bad = sf::gather(table, rows, bytes, ids, out, count); });
  if (none && bad >= 0) {
    Py_CLEAR(none);
    PyErr_Format(PyExc_IndexError, "row %ld of a table of %ld", long(ids[bad]), rows);
  }
  return none;
}

PyObject* rotary_angles(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 7);
  const int64_t* positions = a.pointer<int64_t>();
  const float* inv_freq = a.pointer<float>();
  const long ld = a.integer();
  float* cos = a.pointer<float>();
  float* sin = a.pointer<float>();
  const long tokens = a.integer(), half = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { sf::rotary_angles(positions, inv_freq, ld, cos, sin, tokens, half); });
}

PyObject* delta_gates(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 13);
  const void* x = a.pointer(); const long ldx = a.integer();
  const void* b = a.pointer(); const long ldb = a.integer();
  const int dtype = int(a.integer());
  const void* a_log = a.pointer(); const int a_log_type = int(a.integer());
  const void* bias = a.pointer(); const int bias_type = int(a.integer());
  float* g = a.pointer<float>();
  float* beta = a.pointer<float>();
  const long tokens = a.integer(), heads = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil(
      [&] { sf::delta_gates(x, ldx, b, ldb, dtype, a_log, a_log_type, bias, bias_type, g, beta, tokens, heads); });
}

PyObject* read(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 2);
  const void* p = a.pointer();
  const long bytes = a.integer();
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->read(p, bytes); });
}

PyObject* peak(PyObject*, PyObject* const* args, Py_ssize_t n) {
  Args a(args, n, 2);
  const int what = int(a.integer());
  const long steps = a.integer();
  if (!a.ok()) return nullptr;
  double done = 0;
  PyObject* none = without_gil([&] { done = current->peak(what, steps); });
  if (!none) return nullptr;
  Py_DECREF(none);
  return PyFloat_FromDouble(done);
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(current->name); }

PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const Kernels* const* k = available(); list && *k; ++k) {
    PyObject* name = PyUnicode_FromString((*k)->name);
    if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
    Py_XDECREF(name);
  }
  return list;
}

PyObject* set_isa(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8(name);
  if (!wanted) return nullptr;
  for (const Kernels* const* k = available(); *k; ++k)
    if (!strcmp((*k)->name, wanted)) {
      current = *k;
      Py_RETURN_NONE;
    }
  PyErr_Format(PyExc_ValueError, "this processor or build has no %s kernels", wanted);
  return nullptr;
}

#define FAST(name, doc) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, doc}

PyMethodDef methods[] = {
    FAST(linear, "x @ w.T + bias for float, int8 or int4 weights"),
    FAST(pack, "pack(address, rows, columns, bytes of an element): rows into panels of 16, in place"),
    FAST(attention, "causal attention over paged keys and values"),
    FAST(delta, "gated delta rule for one or more tokens per request"),
    FAST(conv, "causal depthwise convolution with SiLU"),
    FAST(norm, "RMSNorm, alone, after an addition, or times silu(gate)"),
    FAST(gate, "silu(a) * b, a * sigmoid(b) or a + b"),
    FAST(rotary, "rotary embedding of queries and keys"),
    FAST(rotary_angles, "cosines and sines of positions times frequencies"),
    FAST(gather, "rows of a table, which may lie in a mapped file"),
    FAST(argmax, "largest logit of each row and its index"),
    FAST(kv_write, "keys and values into their slots"),
    FAST(delta_gates, "decay and rate of the gated delta rule"),
    FAST(read, "read(address, bytes): reads memory on all threads"),
    FAST(peak, "peak(what, steps): register-only multiply-adds; returns how many were done"),
    {"isa", isa, METH_NOARGS, "name of the instruction set in use"},
    {"isas", isas, METH_NOARGS, "names of the instruction sets that this processor can run, best first"},
    {"set_isa", set_isa, METH_O, "use another instruction set, for tests and comparisons"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
  current = available()[0];
  PyObject* module = PyModule_Create(&module_def);
  if (module && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE) < 0) Py_CLEAR(module);
  return module;
}
