// Functions that Python calls as its own, with tensors, numbers, None, and tuples of these.
//
// Through ctypes a call takes longer than the arithmetic of a small layer. These functions are builtin functions of
// Python, by its stable ABI. What they need of it is declared here, since a machine with a compiler need not have
// Python.h. The declarations are weak, since the library is linked without Python.
#pragma once

#include <stdint.h>

#include "arguments.h"

struct PyObject;
struct PyMethodDef {
    const char *name;
    PyObject *(*function)(PyObject *, PyObject *const *, intptr_t);
    int flags;
    const char *doc;
};
constexpr int METH_FASTCALL = 0x0080;

#define PYTHON extern "C" __attribute__((weak))
PYTHON PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *);
PYTHON PyObject *PyTuple_GetItem(PyObject *, intptr_t);
PYTHON intptr_t PyTuple_Size(PyObject *);
PYTHON PyObject *PyObject_Type(PyObject *);
PYTHON PyObject *PyObject_GetAttr(PyObject *, PyObject *);
PYTHON PyObject *PyObject_CallMethodObjArgs(PyObject *, PyObject *, ...);
PYTHON PyObject *PyUnicode_InternFromString(const char *);
PYTHON long long PyLong_AsLongLong(PyObject *);
PYTHON void *PyLong_AsVoidPtr(PyObject *);
PYTHON double PyFloat_AsDouble(PyObject *);
PYTHON PyObject *PyErr_Occurred();
PYTHON void PyErr_SetNone(PyObject *);
PYTHON void PyErr_SetString(PyObject *, const char *);
PYTHON void PyErr_Clear();
PYTHON PyObject *PyBool_FromLong(long);
PYTHON void Py_IncRef(PyObject *);
PYTHON void Py_DecRef(PyObject *);
PYTHON void *PyCapsule_GetPointer(PyObject *, const char *);
PYTHON void *PyEval_SaveThread();
PYTHON void PyEval_RestoreThread(void *);
#undef PYTHON

namespace {

// What a tensor is, by DLPack's exchange API (version 1.x), with which torch says it in a tenth of the time of Python.
struct DLTensor {
    void *data;
    int32_t device[2], axes;
    uint8_t kind, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t offset;  // 0, since torch adds it to the data
};
enum : uint8_t { SIGNED, UNSIGNED, FLOATING_POINT, BFLOAT = 4 };  // of kind
enum : int32_t { CPU = 1 };                                       // of device[0]
struct ExchangeApi {
    uint32_t major, minor;
    const void *previous, *others[3];
    int (*describe)(PyObject *, DLTensor *);  // or null. Fails with an error in Python
};

// The objects that the functions know.
struct Known {
    const ExchangeApi *api;  // null: torch has none, or one of another version
    PyObject *none, *yes;
    PyObject *tensor, *parameter;                          // types
    PyObject *no_memory, *mismatch, *other_error;          // errors
    PyObject *dtypes[OTHER];                               // in the order of Dtype
    PyObject *data_ptr, *dtype, *shape, *stride, *is_neg;  // names
} known;

inline void know(PyObject *tuple) {
    Py_IncRef(tuple);  // and with it what it holds, for good
    intptr_t index = 0;
    PyObject *capsule = PyTuple_GetItem(tuple, index++);
    known.none = PyTuple_GetItem(tuple, index++);
    known.yes = PyTuple_GetItem(tuple, index++);
    known.tensor = PyTuple_GetItem(tuple, index++);
    known.parameter = PyTuple_GetItem(tuple, index++);
    known.no_memory = PyTuple_GetItem(tuple, index++);
    known.mismatch = PyTuple_GetItem(tuple, index++);
    known.other_error = PyTuple_GetItem(tuple, index++);
    for (PyObject *&dtype : known.dtypes) dtype = PyTuple_GetItem(tuple, index++);
    known.data_ptr = PyUnicode_InternFromString("data_ptr");
    known.dtype = PyUnicode_InternFromString("dtype");
    known.shape = PyUnicode_InternFromString("shape");
    known.stride = PyUnicode_InternFromString("stride");
    known.is_neg = PyUnicode_InternFromString("is_neg");
    known.api = nullptr;
    if (capsule == known.none) return;
    known.api = static_cast<const ExchangeApi *>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (!known.api) PyErr_Clear();
    else if (known.api->major != 1 || !known.api->describe) known.api = nullptr;
}

struct Tensor {  // None: without data
    void *data = nullptr;
    int64_t dtype = OTHER;
    int64_t axes = 0, n = 1, c = 1, s = 1;  // of the axes (N, C, *)
    int64_t stride = 1;                     // of the first axis

    explicit Tensor(PyObject *object) : object(object) {
        if (is_none()) return;
        if (known.api) describe();
        else ask();
        if (!data && size() > 0) refuse("expected tensors with memory, got one without, such as a FakeTensor");
        if (size() == 1) refuse_negative();
    }
    bool is_none() const { return object == known.none; }
    int64_t size() const { return n * c * s; }
    void *of(int64_t of_dtype, int64_t of_size) const {  // the data, if they are as expected
        if (!is_none() && (dtype != of_dtype || size() != of_size || (axes == 1 && n > 1 && stride != 1))) refuse(MISFIT);
        return data;
    }
    PerChannel vector(int64_t channels) const {
        if (is_none()) return {};
        if (dtype > FLOAT16 || axes != 1 || n != channels) refuse(MISFIT);
        if (stride != 1) refuse_negative();
        return {data, dtype, stride};
    }

  private:
    static constexpr char MISFIT[] = "expected tensors that fit together, got one of another dtype, size or stride";

    static void refuse(const char *why) {
        if (!PyErr_Occurred()) PyErr_SetString(known.other_error, why);
    }
    // A view of the imaginary part of a conjugate holds the negative of its values. No other tensor does, and its
    // strides are even, so that it is dense only if it has one value.
    void refuse_negative() const {
        if (PyErr_Occurred()) return;
        PyObject *is_neg = PyObject_CallMethodObjArgs(object, known.is_neg, nullptr);
        if (!is_neg) return;
        if (is_neg == known.yes) refuse("expected tensors without the negative bit, got one with it: call its resolve_neg()");
        Py_DecRef(is_neg);
    }
    void describe() {
        DLTensor tensor;
        if (known.api->describe(object, &tensor)) return;
        data = tensor.data;
        if (tensor.kind == BFLOAT) dtype = BFLOAT16;
        if (tensor.kind == FLOATING_POINT)
            dtype = tensor.bits == 32 ? FLOAT32 : tensor.bits == 64 ? FLOAT64 : tensor.bits == 16 ? FLOAT16 : OTHER;
        if (tensor.kind == UNSIGNED && tensor.bits == 8) dtype = BYTE;
        if (tensor.kind == SIGNED && tensor.bits == 64) dtype = LONG;
        axes = tensor.axes;
        if (tensor.axes) stride = tensor.strides[0];
        for (int32_t axis = 0; axis < tensor.axes; ++axis) set_size(axis, tensor.shape[axis]);
    }
    void ask() {  // in Python
        if (PyErr_Occurred()) return;
        if (PyObject *address = PyObject_CallMethodObjArgs(object, known.data_ptr, nullptr)) {
            data = PyLong_AsVoidPtr(address);
            Py_DecRef(address);
        } else return;
        if (PyObject *its = PyObject_GetAttr(object, known.dtype)) {
            for (dtype = FLOAT32; dtype < OTHER && known.dtypes[dtype] != its;) ++dtype;
            Py_DecRef(its);
        }
        if (PyObject *strides = PyObject_CallMethodObjArgs(object, known.stride, nullptr)) {
            if (PyTuple_Size(strides)) stride = PyLong_AsLongLong(PyTuple_GetItem(strides, 0));
            Py_DecRef(strides);
        }
        if (PyObject *sizes = PyObject_GetAttr(object, known.shape)) {
            axes = PyTuple_Size(sizes);
            for (intptr_t axis = 0; axis < axes; ++axis)
                set_size(axis, PyLong_AsLongLong(PyTuple_GetItem(sizes, axis)));
            Py_DecRef(sizes);
        }
    }
    void set_size(intptr_t axis, int64_t size) {
        if (axis == 0) n = size;
        else if (axis == 1) c = size;
        else s *= size;
    }

    PyObject *object;
};

class Values {  // the arguments of a call, or the items of a tuple, one after another. None after the last one
  public:
    Values(PyObject *const *arguments, intptr_t count) : arguments(arguments), count(count) {}
    explicit Values(PyObject *tuple) : tuple_(tuple), count(PyTuple_Size(tuple)) {}

    int64_t integer() { return PyLong_AsLongLong(next()); }
    double number() { return PyFloat_AsDouble(next()); }
    Tensor tensor() { return Tensor(next()); }
    template <class T> T *pointer(int64_t dtype, int64_t size) { return static_cast<T *>(tensor().of(dtype, size)); }
    Values tuple() { return Values(next()); }
    bool are_read() const { return index == count; }  // all of them, and no more
    bool is_none() {  // whether the next one is None; then goes on to the one after it
        const bool is_none = at(index) == known.none;
        index += is_none;
        return is_none;
    }

  private:
    PyObject *at(intptr_t i) const { return i >= count ? known.none : arguments ? arguments[i] : PyTuple_GetItem(tuple_, i); }
    PyObject *next() { return at(index++); }

    PyObject *const *arguments = nullptr;
    PyObject *tuple_ = nullptr;
    intptr_t count, index = 0;
};

}  // namespace
