"""Seeded faults: where the kernels' sources could be wrong, and copies that are.

Every fault is a copy of a whole function with one change. The function itself begins with a switch
to its copies (``mutants.h``), so that one build holds all faults and a process picks one of them.
"""

import hashlib
import re
from dataclasses import dataclass, field

# Names that are easily taken for each other.
NEIGHBOURS = {
    "wq": "wk", "wk": "wv", "wv": "wq", "bq": "bk", "bk": "bv", "bv": "bq",
    "d_q": "d_k", "d_k": "d_v", "d_v": "d_q", "wi": "wo", "wo": "wi", "bi": "bo", "bo": "bi",
    "gamma": "beta", "beta": "gamma", "d_gamma": "d_beta", "d_beta": "d_gamma",
    "norm1": "norm2", "norm2": "norm1", "mean": "inv_std", "inv_std": "mean",
    "mean1": "mean2", "inv_std1": "inv_std2", "mean2": "mean1", "inv_std2": "inv_std1",
    "rows": "cols", "cols": "rows", "beta1": "beta2", "beta2": "beta1",
    "correction1": "correction2", "correction2": "correction1", "low": "high", "high": "low",
    "first": "last", "last": "first", "start": "stop", "stop": "start", "left": "right",
    "right": "left", "even": "odd", "odd": "even", "upper": "lower", "lower": "upper",
    "whole": "half", "half": "whole", "a_row": "a_col", "a_col": "a_row",
    "b_row": "b_col", "b_col": "b_row", "batch": "time", "time": "batch", "i": "j", "j": "i",
    "True": "False", "False": "True", "and": "or", "or": "and", "min": "max", "max": "min",
    "k_scales": "v_scales", "v_scales": "k_scales", "inner": "outer", "outer": "inner",
    "tokens": "targets", "targets": "tokens", "d_x": "d_norm", "d_norm": "d_x",
    "activated": "hidden", "hidden": "activated", "normed": "activated",
    "heads": "heads_normed", "heads_normed": "heads", "RELU": "RELU2", "RELU2": "RELU",
    "relu_lanes": "relu2_lanes", "relu2_lanes": "relu_lanes",
    "up": "down", "down": "up", "sum_g": "sum_gx", "sum_gx": "sum_g",
    "mean_g": "mean_gx", "mean_gx": "mean_g", "s0": "s1", "s1": "s2", "s2": "s3", "s3": "s0",
    "TILE_TRITS": "TILE_CODES", "TILE_CODES": "TILE_TRITS",
    "vsum3_store": "vsum_store", "line_stride": "depth_stride", "depth_stride": "line_stride",
}  # fmt: skip

# Each rule: its name, what it looks for, what stands there instead.
OPERATORS = [
    ("sign", r" \+ ", " - "),
    ("sign", r" - (?!>)", " + "),
    ("operator", r" \* ", " + "),
    ("operator", r" // ?", " * "),
    ("operator", r" / ", " * "),
    ("operator", r" % ", " * "),
    ("operator", r" & ", " | "),
    ("operator", r" \| ", " & "),
    ("operator", r" >> ", " << "),
    ("operator", r" << ", " >> "),
    ("operator", r" && ", " || "),
    ("operator", r" \|\| ", " && "),
    ("comparison", r" < ", " <= "),
    ("comparison", r" <= ", " < "),
    ("comparison", r" > ", " >= "),
    ("comparison", r" >= ", " > "),
    ("comparison", r" == ", " != "),
    ("comparison", r" != ", " == "),
    ("assignment", r" \+= ", " -= "),
    ("assignment", r" \+= ", " = "),
    ("assignment", r" -= ", " += "),
    ("sign", r"(?<=[(,=] )-(?=[\w(])|(?<=[(\[])-(?=[\w(])", ""),
    ("operator", r"\bvf32_add(?=[()])", "vf32_sub"),
    ("operator", r"\bvf32_sub(?=\()", "vf32_add"),
    ("operator", r"\bvf32_mul(?=[()])", "vf32_add"),
    ("operator", r"\bvf32_div(?=[()])", "vf32_mul"),
    ("operator", r"\bvf32_max(?=\()", "vf32_min"),
    ("operator", r"\bvf32_min(?=\()", "vf32_max"),
    ("operator", r"(?<=_)add(?=s?_(?:ps|ss|epi|epu))", "sub"),
    ("operator", r"(?<=_)subs?(?=_(?:ps|ss|epi|epu))", "add"),
    ("operator", r"(?<=_)add(?=_(?:ps|ss))", "mul"),
    ("operator", r"(?<=_)mul(?=_ps)", "add"),
    ("operator", r"(?<=_)mul(?=_ps)", "div"),
    ("operator", r"(?<=_)div(?=_ps)", "mul"),
    ("operator", r"(?<=_)max(?=_(?:ps|ss))", "min"),
    ("operator", r"(?<=_)min(?=_(?:ps|ss))", "max"),
    ("operator", r"(?<=_)fmadd(?=_ps)", "fmsub"),
    ("operator", r"(?<=_)fmadd(?=_ps)", "fnmadd"),
    ("operator", r"(?<=_)and(?=_)", "or"),
    ("operator", r"(?<=_)or(?=_)", "and"),
    ("operator", r"(?<=_)unpacklo(?=_)", "unpackhi"),
    ("operator", r"(?<=_)unpackhi(?=_)", "unpacklo"),
    ("operator", r"(?<=_)srai(?=_)", "srli"),
    ("operator", r"(?<=_)srli(?=_)", "slli"),
    ("operator", r"(?<=_)slli(?=_)", "srli"),
    ("operator", r"(?<=_)maskz(?=_mov)", "mask"),
    ("operator", r"(?<=_)loadu(?=_ps)", "load"),
    ("operator", r"\bmovehl", "movelh"),
    ("operator", r"_CMP_GT_OQ", "_CMP_GE_OQ"),
    ("operator", r"cmpgt_ps", "cmpge_ps"),
    ("operator", r"_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO"),
    ("tail", r"(?<=\brange\()([^(),]+)(?=\):)", r"\1 - 1"),
    ("tail", r"(?<=\brange\()([^(),]+)(?=, )", r"\1 + 1"),
    ("tail", r"(?<=, )([^(),]+)(?=\):$)", r"\1 - 1"),
    ("tail", r"(?<=< )(\w+)(?= by )", r"\1 - VF32_LANES"),
    ("tail", r"\b(n|cols|count) - whole\b", r"\1 - whole - 1"),
    ("tail", r"(?<=_first\()([^,]+), left", r"\1, left - 1"),
    ("tail", r"(?<=, )left(?=, )", "left - 1"),
    ("tail", r"(?<=; )(\w+ < )([^;]+)(?=;)", r"\1\2 - 1"),
    ("begin", r"(?<=\bfor \()((?:int|long) \w+ = |\w+ = )0(?=;)", r"\g<1>1"),
    ("begin", r"(?<=\bfor )(\w+ from )0(?= <=)", r"\g<1>1"),
    ("condition", r"(?<=\bif )([^()\n]+)(?=:$)", r"not (\1)"),
    ("condition", r"(?<=\bif \()([^()\n]+)(?=\))", r"!(\1)"),
    ("constant", r"(?<![\w.\]:])0(?![\w.])", "1"),
    ("constant", r"(?<![\w.\]:])1(?![\w.])", "2"),
    ("constant", r"(?<![\w.\]:])([2-9]|[1-9]\d+)(?![\w.])", None),
    ("constant", r"(?<![\w.])0x[0-9a-f]{2}\b", None),
    ("constant", r"(?<![\w.])(\d+\.\d+f?|\d+\.\d+e-?\d+f?)(?!\w)", None),
    ("result", r"(?<=\breturn )([^;\n]+)(?=;|$)", r"(\1) + (\1)"),
    ("result", r"(?<=\breturn )([^;\n]+)(?=;|$)", r"(\1) - (\1)"),
]  # fmt: skip

# What gives the same either way round; a tail of no elements, and a status that nobody reads.
COMMUTATIVE = re.compile(
    r"vf32_(add|mul|fmadd)|_mm\d*_(add|mul|mullo|madd|and|or|fmadd|avg)_\w+"
    r"|min|max"
)
IDLE = re.compile(r"\bwhole <= (n|cols|count)\b(?! by)|^return (1|\(0\) [+-] \(0\))$")
KEYWORDS = {"True", "False", "and", "or", "min", "max"}
DECLARATION = re.compile(r"\s*(?:const |static )*(?:unsigned |signed )?\w+ \**\w+(\[\w+\])+")


@dataclass
class Fault:
    """One change in a function: where, by which rule, and what the line is then."""

    function: "Function"
    rule: str
    begin: int  # in the function's text
    end: int
    new: str
    number: int = 0

    @property
    def offset(self):
        return self.function.text.count("\n", 0, self.begin)

    @property
    def text(self):
        return self.function.text[: self.begin] + self.new + self.function.text[self.end :]

    @property
    def line(self):
        return self.text.split("\n")[self.offset].strip()

    @property
    def name(self):
        """What equivalent.toml calls it."""
        column = self.begin - (self.function.text.rfind("\n", 0, self.begin) + 1)
        return f"{self.function.key}+{self.offset}:{column} {self.line}"


@dataclass
class Function:
    """A function of a source file, as a stretch of its text."""

    path: str
    name: str
    begin: int
    body: int
    end: int
    text: str
    head: str
    indent: str = ""
    owner: str = ""  # its class
    copy: int = 0  # of several of one name, for other instruction sets
    faults: list = field(default_factory=list)

    @property
    def key(self):
        return (
            self.path.split("/")[-1]
            + ":"
            + (f"{self.owner}." if self.owner else "")
            + self.name
            + (f"#{self.copy + 1}" if self.copy else "")
        )


def blank(source, c):
    """The source with comments, strings and what tells no number replaced by spaces."""
    if c:
        pattern = r'/\*.*?\*/|"[^"\n]*"|^\s*#.*?$|\(void\)\w+,?'
    else:
        pattern = (
            r'"""(?s:.*?)"""|f?"[^"\n]*"|#[^\n]*|^\s*(?:START|STOP)_TIMER.*?$'
            r"|^ +raise [^\n]*(?:\n +f?\"[^\n]*)*"
        )
    flags = re.M | (re.S if c else 0)
    if c:
        pattern = pattern.replace(".*?$", "[^\n]*$")

    def spaces(match):
        return re.sub(r"[^\n]", "\x00", match.group())

    return re.sub(pattern, spaces, source, flags=flags)


def closing(text, at, pairs="()[]{}"):
    """The place behind the bracket that closes the one at ``at``."""
    depth = 0
    for i in range(at, len(text)):
        if text[i] in pairs[::2]:
            depth += 1
        elif text[i] in pairs[1::2]:
            depth -= 1
            if depth == 0:
                return i + 1
    raise ValueError("a bracket is never closed")


def arguments(text):
    """Cut at commas outside of brackets: (begin, end) of each."""
    places, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            places.append((begin, i))
            begin = i + 1
    if text[begin:].strip():
        places.append((begin, len(text)))
    stripped = []
    for begin, end in places:
        part = text[begin:end]
        stripped.append(
            (begin + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip()))
        )
    return stripped


def c_functions(path, source):
    """The functions of a header."""
    code, found, seen = blank(source, True), [], {}
    for match in re.finditer(r"^(?:static|FORCE_INLINE)\b[^;{}=]*?\b(\w+)(\()", code, re.M):
        if "__attribute__" in match.group(0):
            continue
        close = closing(code, match.start(2))
        brace = re.compile(r"\s*\{").match(code, close)
        if not brace:
            continue
        end = closing(code, brace.end() - 1, "{}")
        name = match.group(1)
        seen[name] = seen.get(name, 0) + 1
        found.append(
            Function(
                path,
                name,
                match.start(),
                brace.end() - match.start(),
                end,
                source[match.start() : end],
                source[match.start() : close],
                copy=seen[name] - 1,
            )
        )
    return found


def cython_functions(path, source):
    """The functions and methods of a .pyx file."""
    code, found = blank(source, False), []
    classes = list(re.finditer(r"^cdef class (\w+)", code, re.M))
    for match in re.finditer(
        r"^( *)(?:cdef|cpdef|def) (?!class|struct|enum|extern)[^\n(=]*?"
        r"\b(\w+)(\()",
        code,
        re.M,
    ):
        close = closing(code, match.start(3))
        colon = re.compile(r"[^\n:=;]*:\n").match(code, close)
        if not colon:
            continue
        indent = match.group(1)
        end = colon.end()
        for line in re.compile(r"[^\n]*\n").finditer(code, colon.end()):
            text = line.group()
            if text.strip("\x00 \n") and not text.startswith(indent + " "):
                break
            if text.strip(" \n"):
                end = line.end()
        owner = [name[1] for name in classes if name.start() < match.start()][-1:] if indent else []
        found.append(
            Function(
                path,
                match.group(2),
                match.start(),
                colon.end() - match.start(),
                end,
                source[match.start() : end],
                source[match.start() : colon.end()],
                indent,
                "".join(owner),
            )
        )
    return found


def changed_constant(old):
    if old.startswith("0x"):
        return f"0x{int(old, 16) ^ 1:02x}"
    if "." in old:
        number, suffix = (old[:-1], "f") if old.endswith("f") else (old, "")
        return f"({number}{suffix} * 1.125{suffix})" if float(number) else f"1.0{suffix}"
    return str(int(old) - 1)


def candidates(function):
    """Every fault that the rules find in a function."""
    c = function.path.endswith(".h")
    code = blank(function.text, c)
    found = []

    def add(rule, begin, end, new):
        if begin >= function.body and function.text[begin:end] != new:
            found.append(Fault(function, rule, begin, end, new))

    for rule, pattern, new in OPERATORS:
        for match in re.finditer(pattern, code, re.M):
            old = match.group()
            if "\x00" in old:
                continue
            line = code[code.rfind("\n", 0, match.start()) + 1 : match.end()]
            in_brackets = line.rfind("[") > line.rfind("]") or code[match.end()] == "]"
            declared = DECLARATION.match(line) if c else line.lstrip().startswith("cdef ")
            if rule == "constant" and in_brackets and declared:
                continue
            add(rule, *match.span(), changed_constant(old) if new is None else match.expand(new))
    for match in re.finditer(r"(?<![\w])(\w+)\b(?! ?=[^=])", code):
        new = NEIGHBOURS.get(match.group(1))
        line = code[code.rfind("\n", 0, match.start()) + 1 : match.start()]
        known = (
            code[match.start() - 1] == "."
            or new in KEYWORDS
            or re.search(rf"(?<![\w.]){new}\b(?!\()", code)
        )
        if new and known and not line.lstrip().startswith(("cdef", "for ")):
            add("name", *match.span(1), new)
    call = r"\b(?!if\b|for\b|while\b|switch\b|return\b|sizeof\b)(?P<name>\w+)(\()"
    for match in re.finditer(call, code):
        if match.start() < function.body:
            continue
        close = closing(code, match.start(2))
        inside = code[match.end() : close - 1]
        parts = [(match.end() + b, match.end() + e) for b, e in arguments(inside)]
        texts = [function.text[b:e] for b, e in parts]
        for (b, e), text in zip(parts, texts, strict=True):
            if re.fullmatch(r"[a-z_]\w*(\.\w+)*", text) and text not in ("self",):
                add("operand", b, e, f"{text} + 1")
        for (b0, _), (_, e1), left, right in zip(parts, parts[1:], texts, texts[1:], strict=False):
            if left != right:
                between = function.text[b0 + len(left) : e1 - len(right)]
                if b0 != parts[0][0] or not COMMUTATIVE.fullmatch(match["name"]):
                    add("operands", b0, e1, right + between + left)
                add("operand", b0, b0 + len(left), right)
                add("operand", e1 - len(right), e1, left)
    # A statement left out: a call whose result nobody takes, or an addition to something.
    statement = (
        r"^( *)(\w[\w.>-]*\([^;]*?\)|[\w.>*\[\] +-]+ [+-]= [^;]*?);$"
        if c
        else r"^( *)(?!cdef|if|for|while|return|elif|else|def)"
        r"(\w[\w.]*(?:\(\))?(?:\.\w+)*\(|[\w.\[\] +]+ [+-]= )"
    )
    for match in re.finditer(statement, code, re.M):
        begin, end = match.span(2)
        before = code[function.body : begin]
        if sum(map(before.count, "([")) != sum(map(before.count, ")]")):
            continue
        if not c:
            while True:
                line_end = code.index("\n", end)
                piece = code[begin:line_end]
                if piece.count("(") + piece.count("[") <= piece.count(")") + piece.count("]"):
                    end = line_end
                    break
                end = line_end + 1
        add("omission", begin, end, "(void)0" if c else "pass")
    return found


ORDER = (
    "tail",
    "sign",
    "operator",
    "begin",
    "operands",
    "omission",
    "name",
    "assignment",
    "condition",
    "comparison",
    "constant",
    "result",
    "operand",
)


def choose(function, count, unfit):
    """Up to ``count`` faults, spread over the function's lines and the rules."""
    pool, names = [], set()
    for fault in candidates(function):
        if fault.name not in unfit and fault.name not in names and not IDLE.search(fault.line):
            names.add(fault.name)
            pool.append(fault)
    used_lines, used_rules, chosen = {}, {}, []

    def rank(fault):
        digest = hashlib.sha256(fault.name.encode()).hexdigest()
        return (
            used_lines.get(fault.offset, 0)
            + used_rules.get(fault.rule, 0)
            + (3 if fault.rule == "operand" else 2 if fault.rule == "result" else 0),
            digest,
        )

    while pool and len(chosen) < count:
        fault = min(pool, key=rank)
        pool.remove(fault)
        chosen.append(fault)
        used_lines[fault.offset] = used_lines.get(fault.offset, 0) + 1
        used_rules[fault.rule] = used_rules.get(fault.rule, 0) + 1
    return sorted(chosen, key=lambda fault: fault.begin)


def parameter_names(head):
    """The names of a function's parameters."""
    head = re.sub(r"\s+", " ", head)
    inside = head[head.index("(") + 1 : closing(head, head.index("(")) - 1]
    names = []
    for begin, end in arguments(inside):
        text = inside[begin:end].replace(" not None", "").split("=")[0].strip()
        name = re.findall(r"\w+", text)[-1]
        if text != "void":
            names.append(name)
    return names


def renamed(fault):
    """The text of a function that has the fault, under a name of its own."""
    function = fault.function
    name = f"mutant{fault.number}_{function.name.strip('_')}"
    head, body = fault.text[: function.body], fault.text[function.body :]
    if not function.path.endswith(".h"):
        head = re.sub(rf"\b{function.name}\(", f"{name}(", head, count=1)
        if "self" in parameter_names(function.head)[:1]:
            # A cdef method would have to be declared.
            head = re.sub(r"^( *)cdef [^(]*?\b(mutant\w+\()", r"\1def \2", head)
            head = re.sub(r"\) except [^:]+:", "):", head)
        return head + body + ("" if body.endswith("\n") else "\n")
    head = re.sub(rf"\b{function.name}\(", f"{name}(", head, count=1)
    head = re.sub(
        r"^(static inline|FORCE_INLINE|static)",
        "__attribute__((noinline, cold, unused)) static",
        head,
    )
    return head + body + "\n"


def with_switch(function, index):
    """The function's text, choosing among its copies first."""
    faults, names = function.faults, parameter_names(function.head)
    first = faults[0].number
    here = f"mutant_here({first}, {len(faults)}, {index})"
    if function.path.endswith(".h"):
        void = re.match(r"(?:static inline|static|FORCE_INLINE) void \w", function.text)
        calls = " ".join(
            f"case {fault.number}: " + (f"{call}; return;" if void else f"return {call};")
            for fault in faults
            for call in [f"mutant{fault.number}_{function.name}({', '.join(names)})"]
        )
        return (
            function.text[: function.body]
            + f" if ({here}) switch (mutant_chosen) {{ {calls} }}"
            + function.text[function.body :]
        )
    indent = function.indent + "    "
    void = function.name == "__init__" or re.match(r" *cdef (?:inline )?void ", function.head)
    lines = [f"{indent}if {here}:\n"]
    method = names[:1] == ["self"]
    for fault in faults:
        call = (
            ("self." if method else "")
            + f"mutant{fault.number}_{function.name.strip('_')}"
            + f"({', '.join(names[method:])})"
        )
        lines.append(f"{indent}    if mutant_chosen == {fault.number}:\n")
        lines.append(
            f"{indent}        {call}\n{indent}        return\n"
            if void
            else f"{indent}        return {call}\n"
        )
    body = function.text[function.body :]
    docstring = re.match(r'\s*"""(?s:.*?)"""\n', body)
    cut = docstring.end() if docstring else 0
    return function.text[: function.body] + body[:cut] + "".join(lines) + body[cut:]


CYTHON_SWITCH = """
cdef extern from "mutants.h" nogil:
    bint mutant_here(int first, int count, int function)
    int mutant_chosen

"""


def seeded(path, source, functions, numbers):
    """A source file with all its faults behind switches; ``numbers``: of functions, by identity."""
    c, parts, at = path.endswith(".h"), [], 0
    for function in functions:
        if not function.faults:
            continue
        copies = "".join(renamed(fault) for fault in function.faults)
        parts.append(source[at : function.begin])
        switched = with_switch(function, numbers[function.key])
        parts.append(copies + switched if c else switched + "\n" + copies)
        at = function.end
    text = "".join([*parts, source[at:]])
    if c:
        return re.sub(
            r"^(#define \w+_H\n)", r'\1#include "mutants.h"' + "\n", text, count=1, flags=re.M
        )
    # Behind the module's own imports.
    behind = re.search(r"^cdef |^def |^class |^ctypedef ", text, re.M).start()
    return text[:behind] + CYTHON_SWITCH.lstrip() + text[behind:]
