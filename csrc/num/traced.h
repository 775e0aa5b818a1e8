// Numbers that note down what is done with them: a page run on them yields the list of its operations, which whoever cannot run C++ can
// follow: torch, with derivatives of any order and under any transform.
#pragma once

#include "fn.h"

namespace rnnkernels {

enum class Op {
  Constant,
  Slot,
  Vector,
  State,
  Moment,
  Add,
  Sub,
  Mul,
  Div,
  Neg,
  Fma,
  Less,
  Select,
  Min,
  Max,
  Abs,
  Sqrt,
  Exp,
  Sigmoid,
  Tanh,
  Relu
};

// Of earlier operations a, b and c, by their places; of what is given to the page, its index a, for a state also the stage b that sees it.
struct Operation {
  Op op;
  int a, b, c;
  double value;
};

struct Tape {
  static constexpr int room = 4096;
  Operation list[room];
  int count = 0;  // more than there is room for: the page is too long
  int put(Op op, int a = -1, int b = -1, int c = -1, double value = 0) {
    if (count < room) list[count] = {op, a, b, c, value};
    return count++;
  }
};

struct Traced {
  using element = double;
  struct Mask {
    int at;
  };
  static constexpr int lanes = 1;
  inline static thread_local Tape* tape = nullptr;  // where the operations go
  int at = -1;                                      // on it; -1: never set

  Traced() = default;
  Traced(double x) : at(tape->put(Op::Constant, -1, -1, -1, x)) {}
  static Traced made(Op op, int a = -1, int b = -1, int c = -1) {
    Traced t;
    t.at = tape->put(op, a, b, c);
    return t;
  }

  friend Traced operator+(Traced a, Traced b) { return made(Op::Add, a.at, b.at); }
  friend Traced operator-(Traced a, Traced b) { return made(Op::Sub, a.at, b.at); }
  friend Traced operator*(Traced a, Traced b) { return made(Op::Mul, a.at, b.at); }
  friend Traced operator/(Traced a, Traced b) { return made(Op::Div, a.at, b.at); }
  friend Traced operator-(Traced a) { return made(Op::Neg, a.at); }
  friend Traced fma(Traced a, Traced b, Traced c) { return made(Op::Fma, a.at, b.at, c.at); }
  friend Mask lt(Traced a, Traced b) { return {made(Op::Less, a.at, b.at).at}; }
  friend Traced select(Mask m, Traced a, Traced b) { return made(Op::Select, m.at, a.at, b.at); }
  friend Traced min(Traced a, Traced b) { return made(Op::Min, a.at, b.at); }
  friend Traced max(Traced a, Traced b) { return made(Op::Max, a.at, b.at); }
  friend Traced abs(Traced a) { return made(Op::Abs, a.at); }
  friend Traced sqrt(Traced a) { return made(Op::Sqrt, a.at); }
  friend Traced exp(Traced a) { return made(Op::Exp, a.at); }
  friend Traced sigmoid(Traced a) { return made(Op::Sigmoid, a.at); }
  friend Traced tanh(Traced a) { return made(Op::Tanh, a.at); }
  friend Traced relu(Traced a) { return made(Op::Relu, a.at); }
};

}  // namespace rnnkernels
