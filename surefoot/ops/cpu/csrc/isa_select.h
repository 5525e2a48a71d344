// Which kernels this processor can run.
#pragma once
#include "kernels.h"

namespace sf {

// Best first, ended by null; the portable ones are always among them.
const Kernels* const* available();

}  // namespace sf
