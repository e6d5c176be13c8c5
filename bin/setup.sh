# Makes and checks the virtual environment .venv at the root of the repository.
# Sourced by bin/asyncembed and bin/test, which have set `root` to that root; bash 3.2 is enough.
#
# Environment:
#   PYTHON               the python to make .venv with (default: the first suitable one on PATH)
#   ASYNCEMBED_PIP_ARGS  more arguments for `pip install`, split at spaces (an index, --no-index, …)
#
# A stamp is a file inside .venv, written last, that repeats what the installation was made from. One that is missing
# or says something else means: set up again. Comparing it starts no process, so a call that finds all well costs
# milliseconds. `.unfinished` lies in .venv for as long as a set-up runs; one found later was interrupted.

venv=$root/.venv

say() { printf 'asyncembed: %s\n' "$*" >&2; }

# Sets `contents` to the contents of a file; empty if it cannot be read. No process is started.
read_file() {
    contents=
    if [[ -r $1 ]]; then IFS= read -r -d '' contents <"$1" || true; fi
}

# Sets `expected` to what a stamp must say now: root and python, then the three files that determine the rest.
expect_stamp() {
    expected="asyncembed set-up 1
root=$root
python=$1
"
    local file
    for file in "$venv/pyvenv.cfg" "$root/pyproject.toml" "$root/constraints.txt"; do
        read_file "$file"
        expected+="--- $file
$contents"
    done
}

# Sets `recorded_root` and `recorded_python` to what the stamp in `contents` says; empty without one.
read_stamp() {
    read_file "$1"
    stamp=$contents recorded_root='' recorded_python=''
    if [[ $stamp == 'asyncembed set-up 1'$'\n'root=*$'\n'python=*$'\n'---* ]]; then
        recorded_root=${stamp#*$'\n'root=}
        recorded_root=${recorded_root%%$'\n'python=*}
        recorded_python=${stamp#*$'\n'python=}
        recorded_python=${recorded_python%%$'\n'---*}
    fi
}

# The real path of a python, and that of its base if it is in a virtual environment: which python it is at heart.
real_python() { "$1" -c 'import os, sys; print(os.path.realpath(sys.executable))' 2>/dev/null; }
base_python() {
    "$1" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))' 2>/dev/null
}
is_same_python() { [[ $(base_python "$1" || true) == "$(base_python "$2" || true)" ]]; }

# Whether .venv has what `$1` (run or test) needs.
is_ready() {
    read_stamp "$venv/.stamp-$1"
    [[ -n $recorded_python && ! -e $venv/.unfinished ]] || return 1
    # Still the python it was made with: gone, or replaced by another version, it would not find its packages.
    [[ -x $venv/bin/python && $venv/bin/python -ef $recorded_python ]] || return 1
    expect_stamp "$recorded_python"
    [[ $stamp == "$expected" ]] || return 1
    # Only someone who names a python pays for starting it.
    [[ -z ${PYTHON:-} ]] || is_same_python "$PYTHON" "$venv/bin/python"
}

# Whether python `$1` is 3.10 or newer and can make virtual environments; `why` says what is wrong with it.
is_suitable() {
    local found
    if ! found=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null); then
        why='does not run'
    elif ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        why="is $found"
    elif ! "$1" -c 'import venv, ensurepip' 2>/dev/null; then
        why="is $found, without venv or ensurepip (Debian and Ubuntu: install python3-venv)"
    else
        why='' version=$found
    fi
    [[ -z $why ]]
}

# Sets `python` and `version` to the first suitable python.
find_python() {
    local candidate seen='' why=''
    if [[ -n ${PYTHON:-} ]]; then
        python=$PYTHON
        if is_suitable "$python"; then return; fi
        say "PYTHON=$PYTHON $why; asyncembed needs python 3.10 or newer."
        return 1
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        if ! python=$(command -v "$candidate"); then continue; fi
        if is_suitable "$python"; then return; fi
        seen+="; $python $why"
    done
    say "no python 3.10 or newer found on PATH${seen}."
    say 'Install one, or name it: PYTHON=/path/to/python3 asyncembed …'
    return 1
}

# Sets `reason` to why .venv has to be removed and made anew; empty if it can be kept.
why_anew() {
    reason=''
    read_stamp "$venv/.stamp-run"
    if [[ -e $venv/.unfinished ]]; then
        reason='an earlier set-up was interrupted'
    elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        reason='its python or pip does not run'
    elif ! is_suitable "$venv/bin/python"; then
        reason="its python $why"
    elif [[ -n $recorded_root && $recorded_root != "$root" ]]; then
        reason="it was made in $recorded_root"
    elif [[ -n $recorded_python && ! $venv/bin/python -ef $recorded_python ]]; then
        reason='its python was replaced'
    elif [[ -n ${PYTHON:-} ]] && ! is_same_python "$PYTHON" "$venv/bin/python"; then
        reason="it was not made with PYTHON=$PYTHON"
    fi
}

# pip with its own progress at a terminal; elsewhere a line for each package, and the rest in .venv/setup.log.
pip_install() {
    local -a more=()
    read -r -a more <<<"${ASYNCEMBED_PIP_ARGS:-}" || true
    # The two variables pin what builds the package, which -c does not reach; the name is relative, for
    # pip would split a path at its spaces.
    local -a command=(
        env PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
        "$venv/bin/python" -m pip install ${more[@]+"${more[@]}"} -c constraints.txt -e "$1"
    )
    if [[ -t 2 ]]; then
        "${command[@]}" >&2
    else
        "${command[@]}" 2>&1 | tee "$venv/setup.log" | while IFS= read -r line; do
            case $line in
            'Collecting '*) line=${line#Collecting } && printf '  %s\n' "${line%%[ ;<>=!~[(]*}" ;;
            'Processing '*) line=${line#Processing } line=${line%% *} && printf '  %s\n' "${line##*/}" ;;
            'Installing collected'*) printf '  installing them\n' ;;
            ' '* | 'WARNING: Location '* | 'Requirement already'* | 'Looking in'* | 'Using cached'* | 'Building '* | 'Created '* | \
                'Obtaining '* | 'Attempting '* | 'Found existing'* | 'Uninstalling '* | 'Successfully '* | '') ;;
            *) printf '  %s\n' "$line" ;;
            esac
        done >&2 || {
            say "pip could not install them; all it said is in $venv/setup.log"
            return 1
        }
    fi
}

# The set-up itself, with the lock held.
set_up() {
    local goal=$1 python='' version='' reason='' why='' started=$SECONDS
    cd -- "$root"
    if [[ -e $venv || -L $venv ]]; then why_anew; fi

    # 1. a python
    if [[ -n $reason || ! -e $venv ]]; then
        find_python
        if [[ -n $reason ]]; then
            say "removing .venv: $reason"
            # The mark goes in first: a removal cut short must not pass for a whole environment.
            { : >"$venv/.unfinished"; } 2>/dev/null || true
            rm -rf -- "$venv"
        fi
        say "[1/3] making $venv with python $version ($python)"
        mkdir -p -- "$venv"
        : >"$venv/.unfinished"
        "$python" -m venv "$venv" >&2
    else
        is_suitable "$venv/bin/python" || true
        say "[1/3] keeping $venv with python $version"
        : >"$venv/.unfinished"
    fi
    rm -f -- "$venv/.stamp-run" "$venv/.stamp-test"

    # 2. the packages; what they are is read before, so that an edit meanwhile is noticed afterwards
    expect_stamp "$(real_python "$venv/bin/python")"
    if [[ $goal == test ]]; then
        say '[2/3] installing asyncembed and its test tools, at the versions of constraints.txt'
        pip_install '.[bench,openvino,server,test]'
    else
        say '[2/3] installing asyncembed, at the versions of constraints.txt'
        pip_install '.[openvino,server]'
    fi

    # 3. the stamps, whole or not at all; what the tests need includes what a run needs
    printf '%s' "$expected" >"$venv/.stamp-new"
    if [[ $goal == test ]]; then cp -- "$venv/.stamp-new" "$venv/.stamp-test"; fi
    mv -f -- "$venv/.stamp-new" "$venv/.stamp-run"
    rm -f -- "$venv/.unfinished"
    say "[3/3] ready after $((SECONDS - started)) s"
}

# One set-up at a time: waits for the lock, in this shell, which keeps it until it exits.
take_lock() {
    local lock=$root/.venv.lock owner
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$lock"
        if ! flock -n 9; then
            say 'another set-up is running; waiting for it'
            flock 9
        fi
        return
    fi
    # Without flock a folder is the lock; one whose owner is dead is taken away.
    lock=$lock.d
    until mkdir -- "$lock" 2>/dev/null; do
        if [[ -z ${waiting:-} ]]; then say "another set-up is running; waiting for it ($lock)"; fi
        waiting=yes
        sleep 1
        read_file "$lock/pid"
        owner=${contents%%$'\n'*}
        if [[ -n $owner ]] && ! kill -0 "$owner" 2>/dev/null; then rm -rf -- "$lock"; fi
    done
    trap 'rm -rf -- "$root/.venv.lock.d"' EXIT
    printf '%s\n' "${BASHPID:-$$}" >"$lock/pid"
}

# Whether what is missing can be made here at all. (access(2) answers: it knows rights, and read-only file systems.)
may_write() {
    local place=$root
    if [[ -w $root && -e $venv ]]; then place=$venv; fi
    if [[ -w $place ]]; then return; fi
    say "$place cannot be written to, and the set-up makes .venv there: let somebody who may write to it call this" \
        'command once, or copy the checkout to a folder of your own.'
    return 1
}

# On Linux the package index has torch with CUDA alone: said before gigabytes of it come to a machine without the device.
warn_of_cuda() {
    [[ $OSTYPE == linux* && -z ${ASYNCEMBED_PIP_ARGS:-} ]] || return 0
    local device
    for device in /dev/nvidiactl /proc/driver/nvidia/version /dev/dxg; do
        if [[ -e $device ]]; then return 0; fi
    done
    say 'there is no NVIDIA device here, yet pip will download PyTorch with CUDA, which takes some 5 GB of disk. For the' \
        "build without it, a fifth of that, press Ctrl-C, choose Linux, Pip and CPU on PyTorch's Get Started page" \
        "(https://pytorch.org/get-started/locally/), and call again with ASYNCEMBED_PIP_ARGS='--extra-index-url" \
        "ADDRESS', the address being the one that stands there after --index-url."
}

# Makes .venv ready for `$1` (run or test), or ends the script: 3 if it cannot be made, 130 after Ctrl-C.
ensure_ready() {
    local status=0
    if is_ready "$1"; then return; fi
    may_write || exit 3
    # A shell of its own holds the lock and the traps. `set -e` would be off inside `( … ) || …`, so look at $? instead.
    set +e
    (
        set -e
        trap 'exit 130' INT
        trap 'exit 143' TERM
        take_lock
        if is_ready "$1"; then exit 0; fi
        if [[ -e $venv/.stamp-run ]]; then
            say 'setting up again: the installation in .venv is not what pyproject.toml and constraints.txt ask for'
        else
            say 'setting up; this happens once and takes some minutes, most of them for the download of torch'
            warn_of_cuda
        fi
        set_up "$1"
    )
    status=$?
    set -e
    case $status in
    0) return ;;
    130 | 143) say 'set-up interrupted; the next call starts it again' ;;
    *) say 'set-up failed, as said above; the next call tries again' && status=3 ;;
    esac
    exit "$status"
}
