# Sourced by the other scripts, from the repository's root.
#
#   environment DIRECTORY FILE ...    makes a virtual environment in the repository, installs the requirements files
#                                     into it, each once for each state of the file, and puts it first on PATH

environment() {
    local venv=$PWD/$1 file stamp
    shift
    if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then  # none yet, half made, or its Python is gone
        rm -rf "$venv"
        local python=${PYTHON:-python3}
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "error: BabyGPT needs Python 3.11 or newer, $python is $("$python" --version 2>&1)." \
                "Name another: PYTHON=python3.12 bash $0" >&2
            exit 2
        fi
        echo "making $venv"
        "$python" -m venv "$venv" || {
            rm -rf "$venv"
            echo "error: no virtual environment could be made. On Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 2
        }
    fi
    for file in "$@"; do
        stamp=$venv/installed-$(cksum < "$file" | tr ' ' '-')
        if [ ! -e "$stamp" ]; then
            echo "installing $file (the first time takes a few minutes)"
            if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"; then
                echo "error: pip could not install $file. Its message above names the package." >&2
                exit 2
            fi
            touch "$stamp"
        fi
    done
    export PATH="$venv/bin:$PATH"
}
