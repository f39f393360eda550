"""Compiles CUDA C++ to PTX through NVRTC's C interface, for `cargo xtask kernels`.

    nvrtc.py LIBRARY OUT_FOLDER OPTION ... -- SOURCE ...

Each SOURCE is compiled under its bare name, with the headers (*.cuh) beside it given by theirs, so that no path gets into the
result, which is written to OUT_FOLDER under the source's name with the ending .ptx.
"""

import ctypes
import pathlib
import sys


def texts(values):
    return (ctypes.c_char_p * len(values))(*values)


class Nvrtc:
    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: {self.library.nvrtcGetErrorString(code).decode()}")

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, text)
        return text.value.decode()

    def compile(self, source, headers, options):
        program = ctypes.c_void_p()
        bodies = texts([header.read_bytes() for header in headers])
        names = texts([header.name.encode() for header in headers])
        self.call(
            "nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), len(headers), bodies, names
        )
        try:
            self.call("nvrtcCompileProgram", program, len(options), texts([option.encode() for option in options]))
            return self.text(program, "PTX")
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{self.text(program, 'ProgramLog')}") from error
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))


def main(library, out, *rest):
    end = rest.index("--")
    nvrtc = Nvrtc(library)
    for source in map(pathlib.Path, rest[end + 1 :]):
        try:
            ptx = nvrtc.compile(source, sorted(source.parent.glob("*.cuh")), rest[:end])
        except RuntimeError as error:
            sys.exit(str(error))
        (pathlib.Path(out) / source.with_suffix(".ptx").name).write_text(ptx)


main(*sys.argv[1:])
