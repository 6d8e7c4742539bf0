# Shell functions. The other scripts source this file from the root of the repository.

# set_up_environment DIRECTORY FILE ...
# Create the virtual environment DIRECTORY in the repository, install the requirements files and put the environment
# first on PATH. A requirements file is installed again only if its contents have changed.
set_up_environment() {
    local venv=$PWD/$1 file stamp
    shift
    if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then  # missing, incomplete, or its Python was removed
        rm -rf "$venv"
        local python=${PYTHON:-python3}
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "error: $python --version prints: $("$python" --version 2>&1). BabyGPT needs Python 3.11 or newer." \
                "Choose another interpreter: PYTHON=python3.12 bash $0" >&2
            exit 2
        fi
        echo "creating $venv"
        "$python" -m venv "$venv" || {
            rm -rf "$venv"
            echo "error: $python could not create $venv. On Debian and Ubuntu: apt-get install python3-venv" >&2
            exit 2
        }
    fi
    for file in "$@"; do
        stamp=$venv/installed-$(cksum < "$file" | tr ' ' '-')
        if [ ! -e "$stamp" ]; then
            echo "installing $file (takes a few minutes the first time)"
            if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"; then
                echo "error: pip could not install $file. See its message above for the package that failed." >&2
                exit 2
            fi
            touch "$stamp"
        fi
    done
    export PATH="$venv/bin:$PATH"
}
