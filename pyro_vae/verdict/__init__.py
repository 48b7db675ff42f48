"""How far a guide is from the posterior, datum by datum, and why."""

from pyro_vae.verdict.bounds import Bounds as Bounds
from pyro_vae.verdict.bounds import bounds as bounds
from pyro_vae.verdict.calibration import Calibration as Calibration
from pyro_vae.verdict.calibration import calibrate as calibrate
from pyro_vae.verdict.collapse import linear_collapse as linear_collapse
from pyro_vae.verdict.compare import Limits as Limits
from pyro_vae.verdict.compare import Verdict as Verdict
from pyro_vae.verdict.compare import compare as compare
from pyro_vae.verdict.diagnosis import Diagnosis as Diagnosis
from pyro_vae.verdict.diagnostics import diagnose as diagnose
from pyro_vae.verdict.gaps import Gaps as Gaps
from pyro_vae.verdict.gaps import gaps as gaps
from pyro_vae.verdict.joint_test import JointTest as JointTest
from pyro_vae.verdict.joint_test import joint_test as joint_test
