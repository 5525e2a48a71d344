// All kernels for one instruction set. Compiled several times, each with its own flags, SF_ISA (a namespace and a
// suffix) and one of SF_AVX512, SF_AVX2, SF_NEON, or none for portable C++.
#include "attention.h"
#include "bench.h"
#include "conv.h"
#include "delta.h"
#include "elementwise.h"
#include "linear.h"

#define SF_JOIN_(a, b) a##b
#define SF_JOIN(a, b) SF_JOIN_(a, b)
#define SF_TEXT_(a) #a
#define SF_TEXT(a) SF_TEXT_(a)

namespace sf {

extern const Kernels SF_JOIN(kernels_, SF_ISA) = {
    SF_TEXT(SF_ISA), SF_ISA::linear, SF_ISA::attention, SF_ISA::delta, SF_ISA::conv,
    SF_ISA::norm, SF_ISA::gate, SF_ISA::rotary, SF_ISA::argmax, SF_ISA::read, SF_ISA::peak,
};

}  // namespace sf
