// The Python side of the kernels: plain functions of integers (addresses, sizes, codes) and floats. Nothing here knows
// PyTorch, so that the extension builds without it; surefoot/ops/cpu checks shapes, dtypes and strides.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>

#include "isa_select.h"
#include "kernels.h"
#include "threads.h"

namespace {

using namespace sf;

const Kernels* current = nullptr;

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
  Args a(args, n, 16);
  Linear j{};
  j.x = a.pointer(); j.ldx = a.integer(); j.xtype = int(a.integer());
  j.y = a.pointer(); j.ldy = a.integer();
  j.bias = a.pointer(); j.bias_type = int(a.integer());
  j.w = a.pointer(); j.wscale = a.pointer(); j.scale_type = int(a.integer());
  j.M = a.integer(); j.N = a.integer(); j.K = a.integer(); j.group = a.integer();
  j.kind = int(a.integer()); j.act_bits = int(a.integer());
  if (!a.ok()) return nullptr;
  return without_gil([&] { current->linear(j); });
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

PyObject* pool(PyObject*, PyObject*) { return PyUnicode_FromString(thread_pool_name()); }

#define FAST(name, doc) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, doc}

PyMethodDef methods[] = {
    FAST(linear, "x @ w.T + bias for float, int8 or int4 weights"),
    FAST(read, "read(address, bytes): reads memory on all threads"),
    FAST(peak, "peak(what, steps): register-only multiply-adds; returns how many were done"),
    {"isa", isa, METH_NOARGS, "name of the instruction set in use"},
    {"isas", isas, METH_NOARGS, "names of the instruction sets that this processor can run, best first"},
    {"set_isa", set_isa, METH_O, "use another instruction set, for tests and comparisons"},
    {"pool", pool, METH_NOARGS, "whose threads run the kernels: torch or own"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
  current = available()[0];
  return PyModule_Create(&module_def);
}
