// What goes wrong for reasons that a user can see and change.

#pragma once

#include <stdexcept>
#include <string>

// A failure that the user can correct: it is printed as one `error:` line.
struct Problem : std::runtime_error {
  int code;  // of the program's exit

  explicit Problem(const std::string& message, int code = 1)
      : std::runtime_error(message), code(code) {}
};
